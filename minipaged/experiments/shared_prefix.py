"""The throughput gained by sharing a prefix (PagedAttention, §6.4, Fig. 16)."""

from __future__ import annotations

from typing import Any

from minipaged.experiments.figures import bars
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.saturation import saturate
from minipaged.experiments.simulator import Roofline
from minipaged.workloads import at_once, shared_prefix, translation_like

LLAMA_13B = Roofline(name="LLaMA-13B on one A100-40GB")  # same number of layers and same width as OPT-13B
PAPER = {80: "1.67", 341: "3.58"}  # prefix tokens: times the throughput of Orca (Oracle)
SYSTEMS: dict[str, dict[str, Any]] = {
    "Orca (Oracle)": {"memory": "orca-oracle"},
    "paged, nothing shared": {"memory": "paged", "enable_prefix_caching": False},
    "paged, prefix shared": {"memory": "paged", "enable_prefix_caching": True},
}
WHY = (
    "the paper compares rates sustained at one latency; ours is throughput with a full queue, where larger batches "
    "and skipped prefills count fully and the host costs nothing; sentence lengths are assumed"
)


def measure(quick: bool, progress: Progress) -> Result:
    """Requests per second with a full queue, for translations with one example and with five in the prefix."""
    rates: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    rows = []
    for tokens, paper in PAPER.items():
        requests = shared_prefix(translation_like(0), at_once(1000 if quick else 2500), tokens)
        for system, settings in SYSTEMS.items():
            progress(sum(map(len, rates.values())) / 6, f"prefix of {tokens} tokens, {system}")
            rates[system].append(saturate(requests, clock=LLAMA_13B, **settings).requests_per_second)
            rows.append(Row(f"prefix of {tokens} tokens, {system}", rates[system][-1], "requests/s"))
        gain = rates["paged, prefix shared"][-1] / rates["Orca (Oracle)"][-1]
        rows.append(Row(f"prefix of {tokens} tokens, shared / Orca (Oracle)", gain, "×", paper, READ, why=WHY))
    labels = [f"{tokens} tokens" for tokens in PAPER]
    figure = bars("Throughput with a shared prefix", labels, rates, "requests/s")
    return Result(rows, figure, [LLAMA_13B.stated(), "A full queue of sentences to translate."], {"rates": rates})
