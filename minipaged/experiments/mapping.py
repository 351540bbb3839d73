"""Step latency with vAttention's memory mapping, synchronous and in the background, in real time."""

from __future__ import annotations

import time
from typing import Any

from minipaged.experiments.figures import lines
from minipaged.experiments.result import Progress, Result, Row
from minipaged.experiments.throughput import Server, scaled

MODES: dict[str, dict[str, Any]] = {
    "paged": {"memory": "paged"},
    **{mode: {"memory": "vattention", "tensor_slicing": True, "mapping": mode} for mode in ("sync", "eager", "async")},
}
PERCENTILES = (50, 90, 99)


def measure(quick: bool, progress: Progress) -> Result:
    """Step latencies of the embedded model with pages mapped on demand, ahead of time, and in the background."""
    from minipaged.llm import LLM

    rounds, steps = (3, 20) if quick else (8, 40)
    llm = LLM("tiny", num_blocks=1)
    servers = {mode: Server(llm, scaled(1500), **settings) for mode, settings in MODES.items()}
    for index, (mode, server) in enumerate(servers.items()):
        progress(index / (2 * len(servers)), f"{mode}, warm-up")
        server.serve(1000)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds):
        progress((1 + number / rounds) / 2, f"round {number + 1} of {rounds}")
        for mode, server in servers.items():
            seconds[mode] += _steps(server, steps)
    rows = [
        Row(f"{mode}: step latency, {percentile}th percentile", 1e3 * _percentile(values, percentile), "ms")
        for mode, values in seconds.items()
        for percentile in PERCENTILES
    ]
    series = {
        mode: (range(101), [1e3 * _percentile(values, percentile) for percentile in range(101)])
        for mode, values in seconds.items()
    }
    top = 3e3 * max(_percentile(values, 90) for values in seconds.values())
    figure = lines("Step latency", series, "percentile of steps", "ms", y_max=top)
    assumed = [f"The embedded model on this device, {rounds} turns of {steps} steps each; prefills included."]
    return Result(rows, figure, assumed, {"seconds": seconds})


def _steps(server: Server, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        server.engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def _percentile(values: list[float], percentile: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percentile // 100, len(ordered) - 1)]
