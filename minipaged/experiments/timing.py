"""Measures time on a machine that runs other programs, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def compare(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, by candidate. They take turns, so that other load affects all of them equally."""
    for candidate in candidates.values():
        candidate()  # warm-up: the first call allocates and compiles
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            _wait()
            started = clock()
            candidate()
            _wait()
            seconds[name].append(clock() - started)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> tuple[float, tuple[float, float]]:
    """Ratio of the first times to the second: median over the rounds, and the quartiles."""
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    quarter = len(ratios) // 4
    return median(ratios), (ratios[quarter], ratios[-1 - quarter])


def _wait() -> None:
    """Waits until a GPU has finished its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
