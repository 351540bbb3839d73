"""Waste in the KV cache by class, under each memory manager (PagedAttention, Fig. 2)."""

from __future__ import annotations

from minipaged.experiments.figures import bars
from minipaged.experiments.result import SECONDARY, Progress, Result, Row
from minipaged.experiments.saturation import saturated_system, sharegpt_traces
from minipaged.experiments.simulator import OPT_13B

PAPER = {  # percent: token, reserved, internal, external
    "Orca (Max)": ("20.4", "13.3", "57.3", "8.9"),
    "Orca (Pow2)": ("26.8", "17.9", "13.6", "41.6"),
    "Orca (Oracle)": ("38.2", "25.2", None, "36.6"),
    "paged": ("96.3", None, None, None),
}
CLASSES = ("token", "reserved", "internal", "external")
WHY = "lengths come from a distribution like ShareGPT's; the paper does not say over which period it averaged"


def measure(quick: bool, progress: Progress) -> Result:
    """Mean percent of the pool's slots by class, while the queue is never empty."""
    traces = sharegpt_traces(quick)
    percent: dict[str, dict[str, float]] = {}
    rows = []
    for system, papers in PAPER.items():
        progress(len(percent) / len(PAPER), system)
        percent[system] = saturated_system(system, quick).percent
        for name, paper in zip(CLASSES, papers, strict=True):
            why = WHY if paper else ""
            rows.append(Row(f"{system}: {name}", percent[system][name], "%", paper, paper and SECONDARY, why=why))
    series = {name: [percent[system][name] for system in PAPER] for name in CLASSES}
    figure = bars("What the slots of the KV cache hold", list(PAPER), series, "% of the pool", stacked=True)
    runs = f"{len(traces)} runs of {len(traces[0])} ShareGPT-like requests, the first fifth of each is warm-up."
    return Result(rows, figure, [OPT_13B.stated(), runs], {"percent": percent})
