"""When requests come. Times are seconds from the start, in ascending order."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def poisson(rate: float, duration: float, seed: int) -> Iterator[float]:
    """``rate`` requests a second, independent of each other, as the PagedAttention paper has them (§6.1)."""
    return gamma(rate, 1.0, duration, seed)


def gamma(rate: float, cv: float, duration: float, seed: int) -> Iterator[float]:
    """Gaps from a Gamma distribution of mean 1 / rate and coefficient of variation ``cv``.

    1 is Poisson; above it requests come in bursts. BurstGPT (Wang et al., arXiv 2401.17644) generates with shape 0.5
    and scale 2, which is one request a second with a CV of 1.41. Raises `ValueError` unless all numbers are positive.
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
    """All of them at the start: the queue is never empty, so the batch is as large as memory allows."""
    return iter([0.0] * count)
