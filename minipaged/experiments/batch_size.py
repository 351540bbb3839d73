"""How many requests run at once under each memory manager (PagedAttention, Fig. 13a)."""

from __future__ import annotations

from minipaged.experiments.figures import bars
from minipaged.experiments.result import SECONDARY, Progress, Result, Row
from minipaged.experiments.saturation import SYSTEMS, saturate
from minipaged.experiments.simulator import OPT_13B
from minipaged.workloads import at_once, sharegpt_like, trace

PAPER = {"Orca (Max)": "7.00", "Orca (Pow2)": "9.81", "Orca (Oracle)": "13.62", "paged": "30.42"}
WHY = {
    "Orca (Pow2)": "lengths are drawn like ShareGPT's, not from it",
    "Orca (Oracle)": "lengths are drawn like ShareGPT's, not from it",
    "paged": "the paper measured at two requests a second, where the queue is sometimes empty; here it never is",
}


def measure(quick: bool, progress: Progress) -> Result:
    """Mean number of running requests while the queue is never empty."""
    requests = trace(sharegpt_like(0), at_once(300 if quick else 3000))
    mean: dict[str, float] = {}
    for system in PAPER:
        progress(len(mean) / len(PAPER), system)
        mean[system] = saturate(requests, **SYSTEMS[system]).simulation.mean_batch
    rows = [
        Row(system, mean[system], "requests", paper, SECONDARY, why=WHY.get(system, ""))
        for system, paper in PAPER.items()
    ]
    series = {"here": list(mean.values()), "paper": [float(paper) for paper in PAPER.values()]}
    figure = bars("Requests that run at once", list(PAPER), series, "requests")
    assumed = [OPT_13B.stated(), f"{len(requests)} ShareGPT-like requests wait; the first fifth to end is warm-up."]
    return Result(rows, figure, assumed, {"mean_batch": mean})
