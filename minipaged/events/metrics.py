"""Metrics computed from events: memory usage, throughput, time to first token (TTFT), inter-token latency.

metrics = Metrics(engine.started_event())
engine.events.subscribe(metrics)
...
print(metrics.summary())
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from minipaged.events import (
    Admitted,
    EngineStarted,
    Event,
    Preempted,
    RequestAdded,
    Sampled,
    Speculated,
    State,
    StepFinished,
)


@dataclass(frozen=True)
class Usage:
    """The usage of the pool's slots at one moment (a slot holds one token's KV).

    ``tokens``: slots with KV that a running sequence reads, shared ones counted once. ``empty``: slots of used blocks
    not yet filled; with paging the only waste, and below one block per sequence. ``cached``: slots of blocks with
    reference count 0 that stay in the prefix cache. ``free``: the rest. ``logical_blocks``: entries of all block
    tables, so that ``1 - used_blocks / logical_blocks`` is what sharing saves (paper §6.3).
    """

    tokens: int
    empty: int
    cached: int
    free: int
    used_blocks: int
    logical_blocks: int

    @property
    def sharing(self) -> float:
        """Fraction of blocks saved by sharing."""
        return 1 - self.used_blocks / self.logical_blocks if self.logical_blocks else 0.0


def usage(state: State) -> Usage:
    """Counts every slot of the pool in one of four classes, which sum to the pool's size."""
    size = state.config["block_size"]
    filled: dict[int, int] = {}
    running = [state.seqs[seq_id] for request in state.running for seq_id in state.requests[request]]
    for seq in running:
        for logical, block in enumerate(seq.table):
            tokens = min(size, max(0, seq.num_computed - logical * size))
            filled[block] = max(filled.get(block, 0), tokens)
    used = len(filled)
    cached = sum(1 for block in state.cached if state.ref_counts[block] == 0)
    tokens = sum(filled.values())
    total = size * len(state.ref_counts)
    return Usage(
        tokens=tokens,
        empty=used * size - tokens,
        cached=cached * size,
        free=total - (used + cached) * size,
        used_blocks=used,
        logical_blocks=sum(len(seq.table) for seq in running),
    )


class Metrics:
    """Subscribes to an engine and computes metrics. Times are seconds on ``clock``.

    It stores one entry per step and request, so it is for short runs, not for a server that runs for weeks.
    """

    def __init__(self, started: EngineStarted, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._arrived: dict[str, float] = {}
        self._last_token: dict[int, float] = {}
        self.state = State()
        self.state.apply(started)
        self.counts: Counter[str] = Counter()
        self.preemptions: Counter[str] = Counter()  # by mode
        self.time_to_first_token: dict[str, float] = {}  # from arrival, by request
        self.inter_token_latency: list[float] = []
        self.usage: list[Usage] = []  # after each step
        self.batch_tokens: list[int] = []  # computed in each step
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.proposed_tokens = self.accepted_tokens = 0  # of drafts

    def __call__(self, event: Event) -> None:
        self.state.apply(event)
        self.counts[event.type] += 1
        if isinstance(event, RequestAdded):
            self._arrived[event.request_id] = self._clock()
        elif isinstance(event, Admitted):
            self.prompt_tokens += len(self.state.seqs[event.seq_id].tokens)
            self.cached_tokens += event.num_cached
        elif isinstance(event, Preempted):
            self.preemptions[event.mode] += 1
        elif isinstance(event, Sampled):
            self._token(event)
        elif isinstance(event, Speculated):
            self.proposed_tokens += event.proposed
            self.accepted_tokens += event.accepted
        elif isinstance(event, StepFinished):
            self.batch_tokens.append(event.num_tokens)
            self.usage.append(usage(self.state))

    def _token(self, event: Sampled) -> None:
        now = self._clock()
        self.output_tokens += 1
        request_id = self.state.seqs[event.seq_id].request_id
        if request_id in self._arrived:
            self.time_to_first_token[request_id] = now - self._arrived.pop(request_id)
        if event.seq_id in self._last_token:
            self.inter_token_latency.append(now - self._last_token[event.seq_id])
        self._last_token[event.seq_id] = now

    @property
    def hit_rate(self) -> float:
        """Prefix cache hit rate: the fraction of the tokens of admitted requests that were cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Fraction of the draft tokens that were accepted."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else 0.0

    def summary(self) -> dict[str, Any]:
        """All metrics as one flat dict, for printing or JSON. Means over steps give every step the same weight."""
        busy = [u for u in self.usage if u.used_blocks]
        held = sum(u.tokens + u.empty for u in busy)
        return {
            "requests": self.counts["request_added"],
            "output_tokens": self.output_tokens,
            "output_tokens_per_second": self.output_tokens / max(self._clock() - self._began, 1e-9),
            "mean_batch_tokens": fmean(self.batch_tokens) if self.batch_tokens else 0.0,
            "token_slots_percent": 100 * sum(u.tokens for u in busy) / held if held else 100.0,
            "mean_sharing_percent": 100 * fmean(u.sharing for u in busy) if busy else 0.0,
            "prefix_hit_percent": 100 * self.hit_rate,
            "speculation_accepted_percent": 100 * self.acceptance_rate,
            "copies": self.counts["copied"],
            "evictions": self.counts["evicted"],
            "preemptions_by_recompute": self.preemptions["recompute"],
            "preemptions_by_swap": self.preemptions["swap"],
            "median_time_to_first_token": median(self.time_to_first_token.values() or [0.0]),
            "median_inter_token_latency": median(self.inter_token_latency or [0.0]),
        }
