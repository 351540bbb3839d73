"""How large a block should be (PagedAttention, §7.2, Fig. 18b)."""

from __future__ import annotations

from minipaged.experiments.figures import lines
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.saturation import saturate
from minipaged.experiments.simulator import OPT_13B, simulate
from minipaged.workloads import alpaca_like, at_once, poisson, sharegpt_like, trace

SIZES = (1, 16, 64, 256, 1024)
WORKLOADS = {"ShareGPT-like": (sharegpt_like, 2.5), "Alpaca-like": (alpaca_like, 70.0)}  # lengths, requests per second
BEST = {"ShareGPT-like": "best at 16–128", "Alpaca-like": "best at 16 and 32"}
WHY = "our clock charges nothing for small blocks; on a GPU they make the kernel slower, which is why 16 is the default"


def measure(quick: bool, progress: Progress) -> Result:
    """Percent of allocated slots that hold tokens, and latency at one rate, for blocks of 1 to 1024 tokens."""
    token: dict[str, list[float]] = {name: [] for name in WORKLOADS}
    latency: dict[str, list[float]] = {name: [] for name in WORKLOADS}
    for name, (lengths, rate) in WORKLOADS.items():
        for size in SIZES:
            done = sum(map(len, token.values())) / (len(WORKLOADS) * len(SIZES))
            progress(done, f"{name}, blocks of {size}")
            count = (100 if quick else 250) * (4 if name == "Alpaca-like" else 1)
            token[name].append(saturate(trace(lengths(0), at_once(count)), block_size=size).token_of_held)
            requests = trace(lengths(0), poisson(rate, 30 if quick else 60, seed=0))
            latency[name].append(simulate(requests, block_size=size).normalized_latency)
    rows = [
        Row(f"{name}, blocks of {size}: {what}", values[name][index], unit, paper, paper and READ, why=why)
        for name in WORKLOADS
        for index, size in enumerate(SIZES)
        for what, values, unit, paper, why in (
            ("slots that hold a token", token, "% of held", None, ""),
            ("normalized latency", latency, "s/token", BEST[name], WHY),
        )
    ]
    series = {name: (SIZES, values) for name, values in latency.items()}
    figure = lines("Latency by block size", series, "block size, tokens", "normalized latency, s/token", log_x=True)
    rates = ", ".join(f"{rate:g} requests/s {name}" for name, (_, rate) in WORKLOADS.items())
    return Result(rows, figure, [OPT_13B.stated(), f"Poisson arrivals: {rates}."], {"token": token, "latency": latency})
