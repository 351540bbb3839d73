"""Experiments that reproduce the papers' figures, one file for each.

    for entry in catalogue():
        print(entry.name, entry.title)
    result = run("batch-size", quick=True, progress=lambda done, text: print(f"{done:.0%} {text}"))
    result.rows, result.figure

Every experiment is deterministic, except for real time measurements; `quick` makes it smaller, never different.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import NamedTuple

from minipaged.errors import InvalidRequest
from minipaged.experiments.result import Progress, Result, Row, machine

__all__ = ["Entry", "Result", "Row", "catalogue", "find", "run"]


class Entry(NamedTuple):
    """An experiment in the catalogue. ``figure``: the figure it reproduces. ``minutes``: duration of a full run."""

    name: str
    title: str
    figure: str
    minutes: float


def catalogue() -> list[Entry]:
    """All experiments, in the order of the papers."""
    return list(_ENTRIES)


def find(name: str) -> Entry:
    """The experiment with this name. Raises `InvalidRequest` if the `catalogue` has none."""
    entry = next((entry for entry in _ENTRIES if entry.name == name), None)
    if entry is None:
        raise InvalidRequest(f"there is no experiment {name!r}; choose one of {', '.join(e.name for e in _ENTRIES)}")
    return entry


def run(name: str, quick: bool = False, progress: Progress | None = None) -> Result:
    """Runs one experiment in this thread.

    ``progress(done, text)`` is called from time to time with the fraction done, from 0 to 1; an exception that it
    raises ends the experiment. Raises `InvalidRequest` for a name that is not in the `catalogue`.
    """
    entry = find(name)
    started = time.perf_counter()
    result = import_module(_module(name)).measure(quick, progress or _silent)
    result.name, result.title, result.reproduces, result.quick = name, entry.title, entry.figure, quick
    result.seconds, result.machine = round(time.perf_counter() - started, 1), machine()
    return result


def _module(name: str) -> str:
    return f"{__name__}.{_MODULES.get(name, name.replace('-', '_'))}"


def _silent(done: float, text: str) -> None:
    pass


# Experiments whose file has another name, because another package already has a file of theirs.
_MODULES = {
    "batchllm": "batch_orders",
    "beam-search": "beam_sharing",
    "eviction": "eviction_policies",
    "waste": "waste_classes",
}

_ENTRIES = (
    Entry("waste", "What the KV cache is filled with, by class of waste", "PagedAttention, Fig. 2", 2),
    Entry("latency", "Requests a second that each system sustains", "PagedAttention, Fig. 12a", 4),
    Entry("batch-size", "How many requests run at once", "PagedAttention, Fig. 13a", 2),
    Entry("throughput", "The real engine at one memory budget", "PagedAttention, §6.2 and the abstract", 2),
    Entry("parallel-sampling", "Memory saved by sharing the prompt of n samples", "PagedAttention, Fig. 15a", 1),
    Entry("beam-search", "Memory saved by beams that share their blocks", "PagedAttention, Fig. 15b", 2),
    Entry("shared-prefix", "What a shared prefix is worth", "PagedAttention, Fig. 16", 1),
    Entry("chatbot", "A chatbot that is shown the conversation so far", "PagedAttention, Fig. 17", 2),
    Entry("kernel-overhead", "What following a block table costs attention", "PagedAttention, Fig. 18a", 1),
    Entry("block-size", "How large a block should be", "PagedAttention, Fig. 18b", 1),
    Entry("recompute-vs-swap", "Getting preempted requests back", "PagedAttention, Fig. 19", 1),
    Entry("batchllm", "A known batch, in four orders and in groups", "BatchLLM, abstract", 10),
    Entry("page-groups", "How finely memory has to be mapped", "vAttention, sizes of page-groups", 2),
    Entry("mapping", "What mapping costs a step, now or in the background", "vAttention, mapping in the background", 2),
    Entry("eviction", "Which cached block to give up, by predictions", "Succinct predictions, hits by errors", 3),
    Entry("burstiness", "Preemptions by the burstiness of arrivals", "BurstGPT's Gamma arrivals", 1),
)
