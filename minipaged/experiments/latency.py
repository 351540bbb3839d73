"""Latency by request rate, and the rate that each system sustains (PagedAttention, Fig. 12a)."""

from __future__ import annotations

from minipaged.experiments.figures import lines
from minipaged.experiments.rates import LIMIT, Curve, sustained, sweep
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.saturation import SYSTEMS
from minipaged.experiments.simulator import OPT_13B
from minipaged.workloads import TraceRequest, poisson, sharegpt_like, trace

START = {"FasterTransformer": 0.4, "Orca (Max)": 1.0, "Orca (Pow2)": 1.4, "Orca (Oracle)": 1.7, "paged": 3.0}
PAPER = {"FasterTransformer": "up to 22", "Orca (Max)": "2.7–8", "Orca (Oracle)": "1.7–2.7"}
WHY = "the paper states neither its latency limit nor the kernels' share of the gain; our clock is a roofline"


def measure(quick: bool, progress: Progress) -> Result:
    """Mean normalized latency by request rate over one duration, and the rate at which it crosses the limit."""
    duration = 30 if quick else 300

    def requests(rate: float) -> list[TraceRequest]:
        return trace(sharegpt_like(0), poisson(rate, duration, seed=0))

    curves: dict[str, Curve] = {}
    for system, start in START.items():
        progress(len(curves) / len(START), system)
        curves[system] = sweep(requests, start * (7 if quick else 1), **SYSTEMS[system])
    rate = {system: sustained(curve) for system, curve in curves.items()}
    rows = [Row(f"sustained rate, {system}", rate[system], "requests/s") for system in START]
    for system, paper in PAPER.items():
        rows.append(Row(f"paged / {system}", rate["paged"] / rate[system], "×", paper, READ, why=WHY))
    axes = "requests/s", "normalized latency, s/token"
    figure = lines("Latency by request rate, ShareGPT-like", curves, *axes, threshold=LIMIT, y_max=1.0)
    assumed = [
        OPT_13B.stated(),
        f"Poisson arrivals for {duration} s of simulated time at every rate; sustained means below {LIMIT:g} s/token.",
    ]
    return Result(rows, figure, assumed, {"curves": curves, "sustained": rate})
