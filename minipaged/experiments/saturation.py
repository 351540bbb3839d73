"""What the pool holds while more requests wait than it can take (PagedAttention, Fig. 2 and 13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minipaged.engine import Engine
from minipaged.experiments.simulator import Simulation, simulate
from minipaged.workloads import at_once, trace


@dataclass(frozen=True)
class Saturated:
    """Means over the steps of a run whose queue was never empty, warm-up excluded."""

    simulation: Simulation
    token_of_held: float  # percent
    requests_per_second: float


def saturate(memory: str, count: int, lengths: Callable[[int], Iterator[tuple[int, int]]], **settings: Any) -> Saturated:
    """Runs ``count`` requests through a memory manager, all there from the start."""
    watched = _Watch()
    run = simulate(
        trace(lengths(0), at_once(count)), watch=watched, warm_up=count // 5, saturated=True, **settings
    )
    return Saturated(run, 100 * watched.token / watched.held, len(run.served) / run.seconds)


class _Watch:
    def __init__(self) -> None:
        self.token = self.held = 0

    def __call__(self, engine: Engine) -> None:
        for request in engine.scheduler.running:
            self.token += sum(seq.num_computed for seq in request.live)
        self.held += (engine.num_blocks - engine.memory.pool.num_free) * engine.memory.block_size
