"""Runs with a queue that is never empty, and what the pool holds then: the conditions of the paper's Fig. 2 and 13."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from minipaged.core.engine import Engine
from minipaged.core.plan import StepPlan
from minipaged.events.waste import Held, Progress
from minipaged.experiments.simulator import simulate
from minipaged.workloads import TraceRequest, at_once, sharegpt_like, trace

SYSTEMS: dict[str, dict[str, Any]] = {
    "FasterTransformer": {"memory": "orca-max", "batching": "static"},
    "Orca (Max)": {"memory": "orca-max"},
    "Orca (Pow2)": {"memory": "orca-pow2"},
    "Orca (Oracle)": {"memory": "orca-oracle"},
    "paged": {"memory": "paged"},
}


@dataclass(frozen=True)
class Saturated:
    """Runs whose queue was never empty; means over the steps past the warm-up.

    ``percent`` is the share of the whole pool in each class of waste. Unallocated slots count as external waste:
    requests are waiting, and the manager could not use these slots for them.
    """

    percent: dict[str, float]
    token_of_held: float  # percent
    mean_batch: float
    requests_per_second: float


def saturate(*traces: list[TraceRequest], **settings: Any) -> Saturated:
    """Simulates traces whose requests all arrive at the start (`at_once`); a fifth of each is warm-up."""
    watch = HeldByClass()
    runs = [simulate(t, watch=watch, warm_up=len(t) // 5, saturated=True, **settings) for t in traces]
    served, seconds = sum(len(run.served) for run in runs), sum(run.seconds for run in runs)
    batch = fmean(size for run in runs for size in run.batch)
    return Saturated(watch.percent, watch.token_of_held, batch, served / seconds)


def sharegpt_traces(quick: bool) -> list[list[TraceRequest]]:
    """Several short traces instead of one long one, in which a few huge requests could fill the pool for minutes."""
    seeds, count = (4, 100) if quick else (8, 160)
    return [trace(sharegpt_like(seed), at_once(count)) for seed in range(seeds)]


@cache  # two experiments use the same runs
def saturated_system(system: str, quick: bool) -> Saturated:
    """Simulates one of the `SYSTEMS` on `sharegpt_traces`."""
    return saturate(*sharegpt_traces(quick), **SYSTEMS[system])


class HeldByClass:
    """Watches an engine and sums the slots that its memory manager holds, by class (PagedAttention, §3.1)."""

    def __init__(self) -> None:
        self._held, self._slots = Held(), 0

    def __call__(self, engine: Engine, plan: StepPlan) -> None:
        coming = {chunk.seq.seq_id: chunk.num_tokens for chunk in plan.chunks}
        # The last token's KV is never computed, because no later token reads it.
        self._held += engine.memory.held(
            Progress(
                seq.seq_id,
                seq.num_prompt,
                seq.num_computed + coming.get(seq.seq_id, 0),
                seq.num_prompt + request.max_output - 1,
            )
            for request in engine.scheduler.running
            for seq in request.live
            if seq.seq_id in engine.memory.tables
        )
        self._slots += engine.num_blocks * engine.memory.block_size

    @property
    def percent(self) -> dict[str, float]:
        """Percent of the whole pool by class, summing to 100; unallocated slots are external."""
        shares = {name: 100 * slots / self._slots for name, slots in self._held._asdict().items()}
        return shares | {"external": shares["external"] + 100 * (1 - self._held.total / self._slots)}

    @property
    def token_of_held(self) -> float:
        return 100 * self._held.token / self._held.total
