"""Runs one LLM on all the processes that torchrun started."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from minipaged.features.tensor_parallel.ranks import broadcast, process_group
from minipaged.llm import LLM

T = TypeVar("T")


def run(use: Callable[[LLM], T], model: str = "tiny", **settings: Any) -> T | None:
    """Runs one LLM on all the processes that torchrun started, each of which calls this with the same arguments.

    On rank 0, calls ``use`` with an `LLM` and returns its result. The other ranks execute its plans, ignoring Ctrl-C,
    until ``use`` returns or raises; their result is ``None``. ``settings`` are those of `EngineConfig`, without CUDA
    graphs and vAttention. Raises `InvalidConfig` or `ModelError` on all ranks; `WorkerFailed` where one lost another.
    """
    with process_group() as shard:
        llm = LLM(model, shard=shard, **settings)
        runner: Any = llm.engine.runner
        if shard.rank == 0:
            try:
                return use(llm)
            finally:
                if not runner.in_step:  # else the others wait in the step, and fail when rank 0 leaves
                    broadcast(None)
        with suppress(ValueError):  # not in the main thread, which alone receives Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # every process gets it, but rank 0 ends the work
        while (plan := broadcast(None)) is not None:
            runner.execute(plan)  # only the runner is used, never its engine
    return None
