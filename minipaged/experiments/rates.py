"""Latency at increasing request rates, up to the rate that a system can no longer sustain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.experiments.simulator import simulate
from minipaged.workloads import TraceRequest

LIMIT = 0.5  # seconds per output token; the paper states no limit, so each figure shows ours
FACTOR = 1.25  # between neighbouring rates

Curve = tuple[list[float], list[float]]  # requests/s, mean normalized latency in s/token


def sweep(make_trace: Callable[[float], list[TraceRequest]], start: float, **settings: Any) -> Curve:
    """Simulates higher rates than ``start``, or lower ones, until the latency crosses `LIMIT`."""
    points: dict[float, float] = {}

    def above(rate: float) -> bool:
        points[rate] = simulate(make_trace(rate), **settings).normalized_latency
        return points[rate] > LIMIT

    rate, too_high = start, above(start)
    while above(rate := rate / FACTOR if too_high else rate * FACTOR) == too_high:
        pass
    rates = sorted(points)
    return rates, [points[rate] for rate in rates]


def sustained(curve: Curve) -> float:
    """The rate in requests/s at which the latency crosses `LIMIT`, by linear interpolation."""
    rates, latencies = curve
    over = next(i for i, latency in enumerate(latencies) if latency > LIMIT)
    low, high, under, beyond = rates[over - 1], rates[over], latencies[over - 1], latencies[over]
    return low + (high - low) * (LIMIT - under) / (beyond - under)
