"""Measures the cost of scheduling: the real engine, scheduler and block tables with a runner that computes nothing."""

from __future__ import annotations

import cProfile
import gc
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.core.plan import SampledToken, StepPlan
from minipaged.events import Event

CONTEXT = 2_000  # tokens per prompt in the measurement that the performance targets refer to
SHORT = 200  # tokens per prompt where thousands of sequences must fit into the pool
BUDGET = 1 << 16  # tokens per step
TOKEN = SampledToken(5)


class IdleRunner:
    """A runner that executes nothing."""

    def execute(self, plan: StepPlan) -> None:
        return None


def idle_engine(num_seqs: int, longest: int) -> Engine:
    """An engine whose steps cost host time only, with KV blocks for ``num_seqs`` sequences of ``longest`` tokens."""
    config = EngineConfig(
        model="none",
        num_blocks=num_seqs * -(-longest // 16),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=BUDGET,
        max_model_len=longest,
    )
    return assemble(config, IdleRunner(), lambda _, plan: [TOKEN] * len(plan.samples), vocab_size=100)


def decoding(num_seqs: int, context: int, steps: int) -> Engine:
    """An engine whose sequences have all finished prefill and will decode for ``steps`` more steps."""
    prefills = num_seqs * context // BUDGET + 2  # steps of prefill, in which the first sequences already decode
    engine = idle_engine(num_seqs, context + prefills + steps)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for i in range(num_seqs):
        prompt = [i % 100, i // 100, *[7] * (context - 2)]  # no two have a common prefix, so no block is shared
        engine.add_request(str(i), prompt, params)
    while engine.scheduler.waiting or any(r.seqs[0].num_output == 0 for r in engine.scheduler.running):
        engine.step()
    return engine


def microseconds(engine: Engine, steps: int) -> float:
    """CPU time of ``steps`` decode steps, in µs per sequence and step."""
    started = time.process_time()
    for _ in range(steps):
        engine.step()
    return (time.process_time() - started) / steps / len(engine.scheduler.running) * 1e6


def cost(num_seqs: int, context: int, steps: int, rounds: int, recorded: bool = False) -> dict[str, Any]:
    """Cost in µs per sequence and step: best and median of ``rounds`` measurements of ``steps`` steps."""
    engine = decoding(num_seqs, context, steps * rounds)
    if recorded:
        kept: list[Event] = []
        engine.events.subscribe(kept.append)
    figures = [microseconds(engine, steps) for _ in range(rounds)]
    return {
        "sequences": num_seqs,
        "context": context,
        "recorder": recorded,
        "best_us": round(min(figures), 2),
        "median_us": round(median(figures), 2),
    }


def profile(num_seqs: int, context: int, steps: int, lines: int = 12) -> list[dict[str, Any]]:
    """Profiles decode steps: the functions with the most own time, in µs per sequence and step, profiling included."""
    engine = decoding(num_seqs, context, steps)
    profiler = cProfile.Profile()
    profiler.enable()
    microseconds(engine, steps)
    profiler.disable()
    rows: dict[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    most = sorted(rows.items(), key=lambda row: -row[1][2])[:lines]
    per = 1e6 / steps / num_seqs
    return [
        {"function": f"{Path(file).name}:{name}", "calls": calls, "own_us": round(own * per, 2)}
        for (file, _, name), (_, calls, own, _, _) in most
    ]


def memory_growth(requests: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Resident memory (MiB) while an engine serves many short, different requests, from the first tenth to the end."""
    engine = idle_engine(256, 64)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    sizes: list[float] = []
    added = 0
    while added < requests or engine.has_unfinished():
        for _ in range(min(256 - len(engine.scheduler.running), requests - added)):
            prompt = [added // 10**k % 10 for k in range(8)] + [9] * 16
            engine.add_request(str(added), prompt, params)
            added += 1
            if added % (requests // 10) == 0:
                gc.collect()
                sizes.append(round(psutil.Process().memory_info().rss / 2**20, 1))
                tell(f"{added} requests, {sizes[-1]} MiB")
        engine.step()
    return {"requests": requests, "resident_mib": sizes, "grown_mib": round(sizes[-1] - sizes[0], 1)}


def measure(quick: bool = False, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs all measurements: about two minutes on a slow core; with ``quick`` ten seconds."""
    steps, rounds = (4, 3) if quick else (20, 5)
    costs = [cost(256, CONTEXT, steps, rounds, recorded) for recorded in (False, True)]
    for number in (64, 256, 1024) if quick else (64, 256, 1024, 4096):
        costs.append(cost(number, SHORT, steps, rounds))
        tell(f"{number} sequences: {costs[-1]['best_us']} µs a sequence a step")
    return {
        "costs": costs,
        "profile": profile(256, CONTEXT, steps),
        "memory": memory_growth(2_000 if quick else 100_000, tell),
    }
