"""What lab A5's schedulers must do. All of it happens in the engine: a scheduler alone decides about nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from minipaged.core.seams import MemoryManager
from minipaged.labs import toy
from minipaged.labs.a5.proxy import LabScheduler
from minipaged.labs.checking import Tape, Trace, Trial

ROOMY = {"num_blocks": 200, "max_num_batched_tokens": 1000}


def scheduler(student: Any, memory: MemoryManager, **settings: Any) -> LabScheduler:
    """The scheduler with which the engine runs on the student's code."""
    return LabScheduler(student, memory, **settings)


def _search(trial: Trial, number: int, longest: int, every: int = 0, **settings: Any) -> None:
    def run(trace: Trace, tape: Tape) -> None:
        engine = toy.toy_engine(make_scheduler=partial(scheduler, trial.student, say=tape.say), **settings)
        toy.serve(engine, trace, tape, every)

    trial.search([toy.requests(trial.random, number, longest, samples=1)], run)


def a5_1(trial: Trial) -> None:
    """Room and budget for everybody: only the number of requests is limited."""
    for max_num_seqs, every in ((1, 0), (3, 0), (3, 2), (8, 1)):
        _search(trial, 6, 6, every, max_num_seqs=max_num_seqs, **ROOMY)


def a5_2(trial: Trial) -> None:
    """Budgets smaller than prompts."""
    for budget, max_num_seqs, every in ((1, 1, 0), (4, 4, 1), (5, 3, 3), (9, 8, 0)):
        settings = {"max_num_batched_tokens": budget, "max_num_seqs": max_num_seqs}
        _search(trial, 6, 10, every, num_blocks=200, **settings)


def a5_3(trial: Trial) -> None:
    """Pools that run full."""
    for num_blocks, every in ((8, 0), (10, 1), (12, 3)):
        _search(trial, 6, 8, every, num_blocks=num_blocks, block_size=2, max_num_batched_tokens=100)


def a5_4(trial: Trial) -> None:
    """Everything at once: the tokens are those of an engine without haste and need."""
    for budget, max_num_seqs, every in ((4, 4, 1), (8, 8, 2), (5, 3, 0)):
        settings = {"num_blocks": 9, "block_size": 2, "max_num_seqs": max_num_seqs}
        _search(trial, 8, 8, every, max_num_batched_tokens=budget, **settings)


CHECKS = {"A5.1": a5_1, "A5.2": a5_2, "A5.3": a5_3, "A5.4": a5_4}
