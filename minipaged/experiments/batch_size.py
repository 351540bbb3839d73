"""How many requests run at once under each memory manager (PagedAttention, Fig. 13a)."""

from __future__ import annotations

from minipaged.experiments.figures import bars
from minipaged.experiments.result import SECONDARY, Progress, Result, Row
from minipaged.experiments.saturation import saturated_system, sharegpt_traces
from minipaged.experiments.simulator import OPT_13B

PAPER = {"Orca (Max)": "7.00", "Orca (Pow2)": "9.81", "Orca (Oracle)": "13.62", "paged": "30.42"}
WHY = {
    "Orca (Pow2)": "lengths come from a distribution like ShareGPT's, not from the data set",
    "Orca (Oracle)": "lengths come from a distribution like ShareGPT's, not from the data set",
    "paged": "the paper measured at two requests a second, where the queue is sometimes empty; here it never is empty",
}


def measure(quick: bool, progress: Progress) -> Result:
    """Mean number of running requests while the queue is never empty."""
    traces = sharegpt_traces(quick)
    mean: dict[str, float] = {}
    for system in PAPER:
        progress(len(mean) / len(PAPER), system)
        mean[system] = saturated_system(system, quick).mean_batch
    rows = [
        Row(system, mean[system], "requests", paper, SECONDARY, why=WHY.get(system, ""))
        for system, paper in PAPER.items()
    ]
    series = {"here": list(mean.values()), "paper": [float(paper) for paper in PAPER.values()]}
    figure = bars("Requests that run at once", list(PAPER), series, "requests")
    runs = f"{len(traces)} runs of {len(traces[0])} ShareGPT-like requests, the first fifth of each is warm-up."
    return Result(rows, figure, [OPT_13B.stated(), runs], {"mean_batch": mean})
