"""Times calls on a device, and measures its memory bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of repeated measurements."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "runs": len(samples)}


def rate(seconds: dict[str, Any], amount: float) -> dict[str, Any]:
    """Converts one result of `compare` to ``amount`` per second, with its spread; keeps an error."""
    if "error" in seconds:
        return seconds
    fastest, slowest = amount / seconds["min"], amount / seconds["max"]
    return seconds | {"median": amount / seconds["median"], "min": slowest, "max": fastest}


@dataclass
class _Way:
    run: Call  # runs all calls once
    calls: int
    launched: str
    samples: list[float] = field(default_factory=list)  # seconds per call


def compare(
    ways: dict[str, Callable[[], Sequence[Call]]], device: torch.device, seconds: float = 0.2
) -> dict[str, dict[str, Any]]:
    """Times several implementations: name → `spread` of the seconds per call, and how it was launched.

    Each one prepares a list of calls, usually with different inputs, so that no input is in the GPU's cache. They run
    in turns, so that a change of the GPU's clock rate affects all of them. ``seconds``: time for each implementation,
    but at least three runs. An implementation that raises has an ``error`` instead.
    """
    ready: dict[str, _Way] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, prepare in ways.items():
        try:
            ready[name] = _prepared(prepare(), device)
        except Exception as error:  # a broken installation or an unsupported shape must not end the comparison
            results[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    runs = {name: _runs(_seconds_of(way.run, device), seconds) for name, way in ready.items()}
    for turn in range(max(runs.values(), default=0)):
        for name, way in ready.items():
            if turn < runs[name]:
                way.samples.append(_seconds_of(way.run, device) / way.calls)
    for name, way in ready.items():
        results[name] = spread(way.samples) | {"launched": way.launched}
    return {name: results[name] for name in ways}


def _runs(once: float, seconds: float) -> int:
    return max(3, min(30, int(seconds / max(once, 1e-6))))


def _prepared(calls: Sequence[Call], device: torch.device) -> _Way:
    """Warms up. On a GPU, captures the calls in a CUDA graph if possible, or Python's launch overhead dominates."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if device.type != "cuda":
        return _Way(run, len(calls), "one by one")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it synchronizes with the host, so it cannot be captured
        torch.cuda.synchronize()
        return _Way(run, len(calls), "one by one")
    graph.replay()
    torch.cuda.synchronize()
    return _Way(graph.replay, len(calls), "CUDA graph")


def _seconds_of(run: Call, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Bytes per second, read plus written, of copying a tensor far larger than any cache on the device."""
    size = 2**20 if smoke else min(2**31, free_memory(device) // 4)
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    seconds = compare({"copy": lambda: [lambda: target.copy_(source)] * 3}, device, seconds=0.5)["copy"]
    return rate(seconds, 2 * source.nbytes)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device; on a CPU, enough for smoke runs."""
    if device.type != "cuda":
        return 2**28
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def cache_size(device: torch.device) -> int:
    """Bytes of the GPU's last-level cache; on a CPU a small number, to keep smoke runs small."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**12
