"""One LLM of all the processes that torchrun started."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from minipaged.features.tensor_parallel.ranks import broadcast, process_group
from minipaged.llm import LLM

T = TypeVar("T")


def run(use: Callable[[LLM], T], model: str = "tiny", **settings: Any) -> T | None:
    """An LLM of all the processes that torchrun started, each of which calls this with the same arguments.

    On rank 0, ``use`` is called with an `LLM`, and its result returned. The others work for that, ignoring Ctrl-C,
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
                if not runner.in_step:  # else the others wait there, and see that rank 0 leaves
                    broadcast(None)
        with suppress(ValueError):  # not in the main thread, which alone hears of Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # everybody gets it, but rank 0 ends the work
        while (plan := broadcast(None)) is not None:
            runner.execute(plan)  # its engine is never asked for anything
    return None
