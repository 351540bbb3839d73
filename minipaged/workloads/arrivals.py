"""Arrival times of requests: seconds from the start, in ascending order."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def poisson(rate: float, duration: float, seed: int) -> Iterator[float]:
    """Poisson arrivals: ``rate`` independent requests per second, as in the PagedAttention paper (§6.1)."""
    return gamma(rate, 1.0, duration, seed)


def gamma(rate: float, cv: float, duration: float, seed: int) -> Iterator[float]:
    """Arrivals with gaps from a Gamma distribution of mean 1 / rate and coefficient of variation ``cv``.

    A ``cv`` of 1 is Poisson; above it requests come in bursts. BurstGPT (Wang et al., arXiv 2401.17644) uses shape 0.5
    and scale 2, which is one request per second with a CV of 1.41. Raises `ValueError` unless all numbers are positive.
    """
    if not (rate > 0 and cv > 0 and duration > 0):
        raise ValueError(f"rate ({rate}), cv ({cv}) and duration ({duration}) must be positive")
    return _gamma(Random(f"arrivals/{seed}"), 1 / cv**2, cv**2 / rate, duration)


def _gamma(rng: Random, shape: float, scale: float, duration: float) -> Iterator[float]:
    now = rng.gammavariate(shape, scale)
    while now < duration:
        yield now
        now += rng.gammavariate(shape, scale)


def at_once(count: int) -> Iterator[float]:
    """All requests at the start: the queue is never empty, so the batch is as large as memory allows."""
    return iter([0.0] * count)
