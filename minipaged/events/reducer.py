"""Rebuilds the engine's state from its events. The JavaScript version is ``visualizer/static/reducer.js``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minipaged.events.types import (
    Admitted,
    Allocated,
    Cached,
    Copied,
    EngineError,
    EngineStarted,
    Event,
    Evicted,
    Filled,
    Finished,
    Forked,
    Freed,
    GroupEnded,
    GroupStarted,
    Predicted,
    Preempted,
    PrefixKept,
    PrefixReleased,
    Proposed,
    RequestAdded,
    Resumed,
    Sampled,
    Scheduled,
    Shared,
    Speculated,
    StepFinished,
    StepStarted,
    SwappedIn,
    SwappedOut,
)

KEPT = 12  # finished requests that a `State` keeps


@dataclass
class SeqState:
    """A sequence's state, rebuilt from events."""

    request_id: str
    num_prompt: int
    tokens: list[int]
    pieces: list[str]
    logprobs: list[float | None]
    num_computed: int = 0
    num_cached: int = 0  # of these, hits in the prefix cache when it was last admitted
    table: list[int] = field(default_factory=list)
    swap_table: list[int] = field(default_factory=list)
    parent: int | None = None
    finish_reason: str | None = None
    limit: int = 0  # maximum number of its tokens, prompt included
    proposed: list[str] = field(default_factory=list)  # texts of its draft tokens
    taken_back: list[str] = field(default_factory=list)  # texts of rejected draft tokens, until the next step


@dataclass
class GroupState:
    """A group of requests with a shared prefix: its requests, how many blocks they share, and the blocks it keeps."""

    request_ids: list[str]
    num_blocks: int
    kept: list[int] = field(default_factory=list)


@dataclass
class State:
    """The engine's state, rebuilt from its events: call ``state.apply(event)`` for each, in order.

    Events that contradict earlier ones raise ``ValueError`` or ``LookupError``.

    ``waiting``, ``running`` and ``swapped`` hold request ids in queue order. ``ref_counts[b]`` is how many block tables
    and groups refer to block b, ``swap_ref_counts`` the same for CPU blocks; ``cached[b]`` is the block's name in the
    prefix cache, ``predicted[b]`` whether it is predicted not to be needed again; ``groups`` holds the unfinished
    groups. ``scheduled`` lists what this step's token budget has been spent on so far. Only the last `KEPT` finished
    requests are kept, so that a state does not grow with the engine's running time; ``forgotten`` counts the sequences
    of the others.
    """

    config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seqs: dict[int, SeqState] = field(default_factory=dict)
    requests: dict[str, list[int]] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)  # of requests with a rank other than 0
    waiting: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    forgotten: int = 0
    ref_counts: list[int] = field(default_factory=list)
    swap_ref_counts: list[int] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, bool] = field(default_factory=dict)
    groups: dict[int, GroupState] = field(default_factory=dict)
    scheduled: list[tuple[int, int, int, int]] = field(default_factory=list)
    error: str | None = None

    def apply(self, event: Event) -> None:
        getattr(self, "_" + event.type)(event)

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-compatible data; the inverse of `from_dict`. A replay can start from it (a keyframe)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> State:
        state = cls(**data)
        state.seqs = {int(seq_id): SeqState(**seq) for seq_id, seq in data["seqs"].items()}
        state.cached = {int(block): prefix for block, prefix in data["cached"].items()}
        state.predicted = {int(block): bit for block, bit in state.predicted.items()}
        state.groups = {int(group): GroupState(**state_of) for group, state_of in data.get("groups", {}).items()}
        state.scheduled = [tuple(entry) for entry in data["scheduled"]]
        return state

    # One method per event type, named after it.

    def _engine_started(self, e: EngineStarted) -> None:
        vars(self).update(vars(State()))  # a run starts from an empty state
        self.config = {f.name: getattr(e, f.name) for f in fields(e)}
        self.ref_counts = [0] * e.num_blocks
        self.swap_ref_counts = [0] * e.swap_blocks

    def _request_added(self, e: RequestAdded) -> None:
        if e.request_id in self.finished:  # the id is reused
            self._forget(e.request_id)
        self.requests[e.request_id] = list(e.seq_ids)
        if e.rank is not None:
            self.ranks[e.request_id] = e.rank
        for seq_id in e.seq_ids:
            tokens, pieces = list(e.prompt_token_ids), list(e.prompt_pieces)
            self.seqs[seq_id] = SeqState(
                e.request_id, len(tokens), tokens, pieces, [None] * len(tokens), limit=len(tokens) + e.max_tokens
            )
        self._queue(self.waiting, e.request_id)

    def _step_started(self, e: StepStarted) -> None:
        self.step = e.step
        self.scheduled = []
        for seq in self.seqs.values():
            seq.proposed, seq.taken_back = [], []

    def _admitted(self, e: Admitted) -> None:
        self.waiting.remove(e.request_id)
        self._queue(self.running, e.request_id)
        seq = self.seqs[e.seq_id]
        seq.num_computed = seq.num_cached = e.num_cached

    def _allocated(self, e: Allocated | Shared) -> None:
        table = self.seqs[e.seq_id].table
        if e.logical != len(table):
            raise ValueError(f"block tables grow at their end: {e}")
        table.append(e.block)
        self.ref_counts[e.block] += 1

    _shared = _allocated

    def _copied(self, e: Copied) -> None:
        self.seqs[e.seq_id].table[e.logical] = e.dst
        self.ref_counts[e.src] -= 1
        self.ref_counts[e.dst] += 1

    def _scheduled(self, e: Scheduled) -> None:
        self.scheduled.append((e.seq_id, e.start, e.num_tokens, e.num_draft))

    def _preempted(self, e: Preempted) -> None:
        self.running.remove(e.request_id)
        if e.mode == "swap":
            self._queue(self.swapped, e.request_id)
            return
        self._queue(self.waiting, e.request_id)
        for seq_id in self.requests[e.request_id]:
            if self.seqs[seq_id].finish_reason is None:
                self.seqs[seq_id].num_computed = 0

    def _swapped_out(self, e: SwappedOut) -> None:
        seq = self.seqs[e.seq_id]
        seq.table, seq.swap_table = [], list(e.swap_blocks)
        self._count(e.blocks, e.swap_blocks, -1)

    def _swapped_in(self, e: SwappedIn) -> None:
        seq = self.seqs[e.seq_id]
        seq.table, seq.swap_table = list(e.blocks), []
        self._count(e.blocks, e.swap_blocks, +1)

    def _count(self, blocks: list[int], swap_blocks: list[int], change: int) -> None:
        for block, swap_block in zip(blocks, swap_blocks, strict=True):
            self.ref_counts[block] += change
            self.swap_ref_counts[swap_block] -= change

    def _resumed(self, e: Resumed) -> None:
        self.swapped.remove(e.request_id)
        self._queue(self.running, e.request_id)

    def _queue(self, queue: list[str], request_id: str) -> None:
        queue.append(request_id)  # by rank, then by first sequence id, which is the order of arrival
        queue.sort(key=lambda r: (self.ranks.get(r, 0), self.requests[r][0]))

    def _filled(self, e: Filled) -> None:
        self.seqs[e.seq_id].num_computed = e.start + e.num_tokens

    def _cached(self, e: Cached) -> None:
        self.cached[e.block] = e.prefix

    def _evicted(self, e: Evicted) -> None:
        del self.cached[e.block]
        self.predicted.pop(e.block, None)

    def _predicted(self, e: Predicted) -> None:
        self.predicted.update(dict.fromkeys(e.blocks, e.discard))

    def _forked(self, e: Forked) -> None:
        parent = self.seqs[e.parent]
        if e.child not in self.seqs:  # a beam, or a fork that a user asked for
            self.seqs[e.child] = SeqState(
                e.request_id, parent.num_prompt, list(parent.tokens), list(parent.pieces), list(parent.logprobs),
                limit=parent.limit,
            )  # fmt: skip
            if all(self.seqs[s].finish_reason for s in self.requests.get(e.request_id, [])):  # now a new request
                self.requests[e.request_id] = [e.child]
                if parent.request_id in self.ranks:
                    self.ranks[e.request_id] = self.ranks[parent.request_id]
                self._queue(self.running, e.request_id)
            else:
                self.requests[e.request_id].append(e.child)
        child = self.seqs[e.child]
        child.num_computed = parent.num_computed
        child.parent = e.parent

    def _sampled(self, e: Sampled) -> None:
        seq = self.seqs[e.seq_id]
        seq.tokens.append(e.token_id)
        seq.pieces.append(e.text)
        seq.logprobs.append(e.logprob)

    def _proposed(self, e: Proposed) -> None:
        self.seqs[e.seq_id].proposed = list(e.pieces)

    def _speculated(self, e: Speculated) -> None:
        seq = self.seqs[e.seq_id]
        seq.proposed, seq.taken_back = [], seq.proposed[e.accepted :]
        for block in e.blocks:
            if seq.table.pop() != block:
                raise ValueError(f"block tables shrink at their end: {e}")
            self.ref_counts[block] -= 1

    def _freed(self, e: Freed) -> None:
        seq = self.seqs[e.seq_id]
        counts = self.swap_ref_counts if seq.swap_table else self.ref_counts
        seq.table, seq.swap_table = [], []
        for block in e.blocks:
            counts[block] -= 1

    def _group_started(self, e: GroupStarted) -> None:
        self.groups[e.group] = GroupState(list(e.request_ids), e.num_blocks)

    def _prefix_kept(self, e: PrefixKept) -> None:
        self.groups[e.group].kept = list(e.blocks)
        for block in e.blocks:
            self.ref_counts[block] += 1

    def _prefix_released(self, e: PrefixReleased) -> None:
        self.groups[e.group].kept = []
        for block in e.blocks:
            self.ref_counts[block] -= 1

    def _group_ended(self, e: GroupEnded) -> None:
        del self.groups[e.group]

    def _finished(self, e: Finished) -> None:
        seq = self.seqs[e.seq_id]
        seq.finish_reason = e.reason
        if all(self.seqs[s].finish_reason for s in self.requests[seq.request_id]):
            for queue in (self.waiting, self.running, self.swapped):
                if seq.request_id in queue:
                    queue.remove(seq.request_id)
            self.finished.append(seq.request_id)
            if len(self.finished) > KEPT:
                self._forget(self.finished[0])

    def _forget(self, request_id: str) -> None:
        self.finished.remove(request_id)
        self.ranks.pop(request_id, None)
        for seq_id in self.requests.pop(request_id):
            del self.seqs[seq_id]
            self.forgotten += 1

    def _step_finished(self, e: StepFinished) -> None:
        pass  # its numbers are for charts; the state does not change

    def _engine_error(self, e: EngineError) -> None:
        self.error = e.message


def replay(events: Iterable[Event]) -> Iterator[State]:
    """Yields the `State` after each event: always the same object, which changes."""
    state = State()
    for event in events:
        state.apply(event)
        yield state
