"""How much memory n samples of one prompt save by sharing it (PagedAttention, §6.3, Fig. 15a)."""

from __future__ import annotations

from minipaged.core.engine import Engine
from minipaged.core.plan import StepPlan
from minipaged.experiments.figures import bars
from minipaged.experiments.result import READ, SECONDARY, Progress, Result, Row
from minipaged.experiments.simulator import OPT_13B, simulate
from minipaged.workloads import alpaca_like, at_once, sharegpt_like, trace

PAPER = {2: "6.09", 4: "8.53", 6: "9.79"}  # Alpaca, percent; the paper's text says 6.1 to 9.8
WHY = "lengths come from a distribution like the data set's, and all samples of a request have the same length"


def measure(quick: bool, progress: Progress) -> Result:
    """Percent of blocks saved for Alpaca-like and ShareGPT-like requests."""
    workloads = {"Alpaca-like": (alpaca_like, (300, 1200)), "ShareGPT-like": (sharegpt_like, (60, 180))}
    saved: dict[str, list[float]] = {name: [] for name in workloads}
    for name, (lengths, counts) in workloads.items():
        for n in PAPER:
            progress(sum(map(len, saved.values())) / 6, f"{name}, {n} samples")
            requests = trace(lengths(0), at_once(counts[not quick]), n=n)
            blocks = BlocksSaved()
            # No warm-up: what a request saves does not depend on the others.
            simulate(requests, watch=blocks)
            saved[name].append(blocks.percent)
    rows = []
    for index, n in enumerate(PAPER):
        rows.append(Row(f"Alpaca-like, n = {n}", saved["Alpaca-like"][index], "%", PAPER[n], SECONDARY, why=WHY))
    for index, n in enumerate(PAPER):
        rows.append(Row(f"ShareGPT-like, n = {n}", saved["ShareGPT-like"][index], "%", "16.2–30.5", READ, why=WHY))
    figure = bars("Blocks saved by sharing, parallel sampling", list(PAPER), saved, "saved, % of blocks")
    return Result(
        rows, figure, [OPT_13B.stated(), "Blocks are counted over the whole lives of all requests."], {"saved": saved}
    )


class BlocksSaved:
    """Watches an engine: blocks saved by sharing, relative to blocks without sharing (the paper's definition)."""

    def __init__(self) -> None:
        self.logical = self.physical = 0

    def __call__(self, engine: Engine, plan: StepPlan | None = None) -> None:
        tables = engine.memory.tables.values()
        self.logical += sum(map(len, tables))
        self.physical += len({block for table in tables for block in table})

    @property
    def percent(self) -> float:
        return 100 * (1 - self.physical / self.logical)
