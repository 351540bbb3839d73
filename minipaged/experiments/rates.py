"""Latency at ever higher request rates, up to where a system no longer keeps up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.experiments.simulator import simulate
from minipaged.workloads import TraceRequest

LIMIT = 0.5  # seconds per output token; the paper does not state where it draws the line, so ours is shown
FACTOR = 1.25  # from one rate to the next

Curve = tuple[list[float], list[float]]  # requests a second, mean normalized latency in seconds per token


def sweep(make_trace: Callable[[float], list[TraceRequest]], start: float, **settings: Any) -> Curve:
    """Walks from ``start`` to higher rates, or to lower ones, until the latency has crossed `LIMIT`."""
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
    """The rate at which the latency crosses `LIMIT`, interpolated between its neighbours."""
    rates, latencies = curve
    over = next(i for i, latency in enumerate(latencies) if latency > LIMIT)
    low, high, under, beyond = rates[over - 1], rates[over], latencies[over - 1], latencies[over]
    return low + (high - low) * (LIMIT - under) / (beyond - under)
