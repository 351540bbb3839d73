"""What happened, as typed deltas: the one stream that the visualizer, metrics, recordings and tests all read.

The engine emits an event at every change of state, ordered within a step as the changes happened. `State` rebuilds
the whole picture from them: live view and replay share this one reducer (its twin in JavaScript is
``visualizer/static/reducer.js``; both are tested on the same recordings). An engine with no listener pays one
attribute test per event.

Ids: ``request_id`` is the caller's string, ``seq_id`` the engine's own number (a request with n samples has n
sequences), ``block`` a physical block, ``logical`` an index into a block table.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

FORMAT = "minipaged-recording/1"
KEPT = 12  # requests that have ended and stay in a `State`


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. ``type`` is the name used in JSON."""

    type: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type} | asdict(self)


@dataclass(frozen=True, slots=True)
class EngineStarted(Event):
    """First event of a run: the sizes everything else is drawn with."""

    type: ClassVar[str] = "engine_started"
    model: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool
    preemption: str
    swap_blocks: int
    bytes_per_block: int
    memory: str = "paged"  # recordings from before there were others do not say
    batching: str = "continuous"


@dataclass(frozen=True, slots=True)
class RequestAdded(Event):
    """A request joined the waiting queue. ``prompt_pieces`` is the prompt's text, token by token."""

    type: ClassVar[str] = "request_added"
    request_id: str
    seq_ids: list[int]
    prompt_token_ids: list[int]
    prompt_pieces: list[str]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class StepStarted(Event):
    type: ClassVar[str] = "step_started"
    step: int


@dataclass(frozen=True, slots=True)
class Admitted(Event):
    """Waiting → running. ``num_cached`` tokens of ``seq_id`` came from the prefix cache."""

    type: ClassVar[str] = "admitted"
    request_id: str
    seq_id: int
    num_cached: int


@dataclass(frozen=True, slots=True)
class Allocated(Event):
    """``block`` is now entry ``logical`` of the sequence's block table."""

    type: ClassVar[str] = "allocated"
    seq_id: int
    logical: int
    block: int


@dataclass(frozen=True, slots=True)
class Shared(Event):
    """As `Allocated`, but the block has other owners too (or waited in the prefix cache)."""

    type: ClassVar[str] = "shared"
    seq_id: int
    logical: int
    block: int
    reason: Literal["fork", "prefix"]


@dataclass(frozen=True, slots=True)
class Copied(Event):
    """Copy-on-write: the sequence was about to write into the shared block ``src`` and now owns a copy, ``dst``."""

    type: ClassVar[str] = "copied"
    seq_id: int
    logical: int
    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class Scheduled(Event):
    """This step computes tokens [start, start + num_tokens) of the sequence: a decode (1) or a prefill chunk.

    The last ``num_draft`` of them are guesses (see `Proposed`).
    """

    type: ClassVar[str] = "scheduled"
    seq_id: int
    start: int
    num_tokens: int
    num_draft: int = 0


@dataclass(frozen=True, slots=True)
class Preempted(Event):
    """Running → waiting (``mode`` "recompute") or swapped ("swap"), with all its sequences (paper §4.5).

    `Freed` or `SwappedOut` events for each of them follow.
    """

    type: ClassVar[str] = "preempted"
    request_id: str
    mode: Literal["recompute", "swap"]
    reason: str


@dataclass(frozen=True, slots=True)
class SwappedOut(Event):
    """The sequence's block table moved to the CPU: ``blocks[i]`` to ``swap_blocks[i]``. Shared blocks move once."""

    type: ClassVar[str] = "swapped_out"
    seq_id: int
    blocks: list[int]
    swap_blocks: list[int]


@dataclass(frozen=True, slots=True)
class SwappedIn(Event):
    """And back again: ``swap_blocks[i]`` to ``blocks[i]``."""

    type: ClassVar[str] = "swapped_in"
    seq_id: int
    swap_blocks: list[int]
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """Swapped → running. `SwappedIn` events for each of its sequences follow."""

    type: ClassVar[str] = "resumed"
    request_id: str


@dataclass(frozen=True, slots=True)
class Filled(Event):
    """The KV of tokens [start, start + num_tokens) is now in the cache."""

    type: ClassVar[str] = "filled"
    seq_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Cached(Event):
    """A full block entered the prefix cache under the name ``prefix``, which stands for all tokens up to its end."""

    type: ClassVar[str] = "cached"
    block: int
    prefix: int
    parent: int


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """A block that nobody used left the prefix cache, to be handed out anew. ``reason``: the policy's, in words."""

    type: ClassVar[str] = "evicted"
    block: int
    reason: str = ""  # recordings from before policies gave any do not say


@dataclass(frozen=True, slots=True)
class Predicted(Event):
    """These cached blocks were used by a request of which was predicted: 1 (``discard``), they will not be needed
    again in time, or 0, they will. An eviction policy goes by it."""

    type: ClassVar[str] = "predicted"
    blocks: list[int]
    discard: bool


@dataclass(frozen=True, slots=True)
class Forked(Event):
    """``child``, a sequence of ``request_id``, starts as a copy of ``parent``.

    `Shared` events for all of its blocks follow (none for a finished hypothesis of a beam search: it needs no KV).
    """

    type: ClassVar[str] = "forked"
    parent: int
    child: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """A token was appended. ``text`` is what became readable with it (may be empty: half a character).

    ``top`` lists the likeliest tokens as [token id, text, log-probability], if the request asked for them. `State`
    does not keep it: five alternatives for every token would make keyframes many times as large.
    """

    type: ClassVar[str] = "sampled"
    seq_id: int
    token_id: int
    text: str
    logprob: float | None
    top: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Proposed(Event):
    """The step also computed a draft of what comes next: these tokens, which the sequence may turn out not to have."""

    type: ClassVar[str] = "proposed"
    seq_id: int
    token_ids: list[int]
    pieces: list[str]


@dataclass(frozen=True, slots=True)
class Speculated(Event):
    """Of ``proposed`` tokens the first ``accepted`` were what the sequence says; the others are taken back.

    ``blocks``, which hold none but those, are given back, tail first. A sequence that has ended gave up all before.
    """

    type: ClassVar[str] = "speculated"
    seq_id: int
    proposed: int
    accepted: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Freed(Event):
    """The sequence gave up its whole block table, listed in the order the references were dropped (tail first).

    The blocks are the CPU's if it was swapped out.
    """

    type: ClassVar[str] = "freed"
    seq_id: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class GroupStarted(Event):
    """Requests of a batch, added just now, make a group: their first ``num_blocks`` blocks shall be computed once."""

    type: ClassVar[str] = "group_started"
    group: int
    request_ids: list[str]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class PrefixKept(Event):
    """The group's common beginning has been computed: it is one more owner of these blocks, in logical order."""

    type: ClassVar[str] = "prefix_kept"
    group: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class PrefixReleased(Event):
    """The group gave these blocks up (tail first): it has ended, or somebody needed the room."""

    type: ClassVar[str] = "prefix_released"
    group: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class GroupEnded(Event):
    """All requests of the group have ended."""

    type: ClassVar[str] = "group_ended"
    group: int


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """A sequence ended: ``"stop"``, ``"length"``, ``"abort"`` or, for a beam that was given up, ``"pruned"``."""

    type: ClassVar[str] = "finished"
    seq_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepFinished(Event):
    type: ClassVar[str] = "step_finished"
    step: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineError(Event):
    """Something went wrong. If a step failed, ``message`` begins with "step": the requests that it was computing were
    aborted, and the engine goes on."""

    type: ClassVar[str] = "engine_error"
    message: str


EVENT_TYPES: dict[str, type[Event]] = {cls.type: cls for cls in Event.__subclasses__()}


def event_from_dict(data: dict[str, Any]) -> Event:
    """The inverse of `Event.to_dict`; unknown types and fields raise ``ValueError``."""
    try:
        cls = EVENT_TYPES[data["type"]]
        return cls(**{key: value for key, value in data.items() if key != "type"})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an event of {FORMAT}: {error}") from error


class EventLog:
    """Where the engine tells what happens. Subscribers are called in order, in the engine's thread.

    They watch: what they want of the engine has to wait until the step is over. One that raises is called no more, and
    a warning says so once the engine is done with what it was doing: its books must not suffer from who reads them.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._failures: list[tuple[Callable[[Event], None], Exception]] = []

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``callback(event)`` for every event from now on. Returns a function that ends it."""
        self._subscribers.append(callback)
        return lambda: self._unsubscribe(callback)

    @property
    def active(self) -> bool:
        """Whether anybody listens. Emitters ask first when making an event costs something."""
        return bool(self._subscribers)

    def emit(self, cls: type[Event], *args: Any) -> None:
        """Makes the event only if somebody listens, so that a silent engine does not pay for it."""
        if self._subscribers:
            event = cls(*args)
            for subscriber in tuple(self._subscribers):  # one may unsubscribe
                try:
                    subscriber(event)
                except Exception as error:
                    self._unsubscribe(subscriber)
                    self._failures.append((subscriber, error))

    def warn_of_failures(self) -> None:
        """Tells of subscribers that raised since the last time. To be called when nothing is half done."""
        while self._failures:
            subscriber, error = self._failures.pop(0)
            trace = "".join(traceback.format_exception(error))
            message = f"a subscriber of events raised and is called no more: {subscriber!r}\n{trace}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _unsubscribe(self, callback: Callable[[Event], None]) -> None:
        if callback in self._subscribers:
            self._subscribers.remove(callback)


@dataclass
class SeqState:
    """A sequence as the events tell it."""

    request_id: str
    num_prompt: int
    tokens: list[int]
    pieces: list[str]
    logprobs: list[float | None]
    num_computed: int = 0
    num_cached: int = 0  # of these, found in the prefix cache when it last joined the batch
    table: list[int] = field(default_factory=list)
    swap_table: list[int] = field(default_factory=list)
    parent: int | None = None
    finish_reason: str | None = None
    limit: int = 0  # tokens it has when it ends, unless it ends earlier
    proposed: list[str] = field(default_factory=list)  # texts of the tokens that it speculates on
    taken_back: list[str] = field(default_factory=list)  # of those that were wrong, until the next step


@dataclass
class GroupState:
    """A group of a batch: who is in it, how many blocks they share, and those that it keeps."""

    request_ids: list[str]
    num_blocks: int
    kept: list[int] = field(default_factory=list)


@dataclass
class State:
    """The engine's state rebuilt from its events: ``state.apply(event)`` for each, in order. Events that contradict
    those before them raise ``ValueError`` or ``LookupError``.

    ``waiting``, ``running`` and ``swapped`` hold request ids in queue order. ``ref_counts[b]`` is how many block tables
    and groups name block b, ``swap_ref_counts`` the same on the CPU; ``cached[b]`` the prefix cache's name for it, and
    ``predicted[b]`` whether a prediction says that it will not be needed; ``groups`` those of a batch that have not
    ended. ``scheduled`` is this step's token budget, as spent so far. Of requests that have ended only the last `KEPT`
    stay, so that a state does not grow with the time that an engine runs; ``forgotten`` counts the sequences of the
    others.
    """

    config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seqs: dict[int, SeqState] = field(default_factory=dict)
    requests: dict[str, list[int]] = field(default_factory=dict)
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
        """JSON-ready; `from_dict` undoes it. Used as the keyframe from which a replay can start."""
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
        vars(self).update(vars(State()))  # a run starts from nothing
        self.config = {f.name: getattr(e, f.name) for f in fields(e)}
        self.ref_counts = [0] * e.num_blocks
        self.swap_ref_counts = [0] * e.swap_blocks

    def _request_added(self, e: RequestAdded) -> None:
        if e.request_id in self.finished:  # an id that is used again
            self._forget(e.request_id)
        self.requests[e.request_id] = list(e.seq_ids)
        self.waiting.append(e.request_id)
        for seq_id in e.seq_ids:
            tokens, pieces = list(e.prompt_token_ids), list(e.prompt_pieces)
            self.seqs[seq_id] = SeqState(
                e.request_id, len(tokens), tokens, pieces, [None] * len(tokens), limit=len(tokens) + e.max_tokens
            )

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
        queue.append(request_id)
        queue.sort(key=lambda r: self.requests[r][0])  # by first sequence id: in order of arrival

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
            if all(self.seqs[s].finish_reason for s in self.requests.get(e.request_id, [])):  # a request of its own
                self.requests[e.request_id] = [e.child]
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
        for seq_id in self.requests.pop(request_id):
            del self.seqs[seq_id]
            self.forgotten += 1

    def _step_finished(self, e: StepFinished) -> None:
        pass  # its numbers are for charts; no state changes

    def _engine_error(self, e: EngineError) -> None:
        self.error = e.message


class Recorder:
    """Subscribes to an engine and keeps every event; with ``path`` also writes them as JSON lines.

    The file's first line is ``{"format": "minipaged-recording/1"}``, each further line one event.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.events: list[Event] = []
        self._file: TextIO | None = None
        if path is not None:
            self._file = open(path, "w", encoding="utf-8")
            self._file.write(json.dumps({"format": FORMAT}) + "\n")

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._file:
            self._file.write(json.dumps(event.to_dict(), separators=(",", ":")) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def load_recording(path: str | Path) -> list[Event]:
    """Reads what `Recorder` wrote. ``ValueError`` names the line that is not of this format."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
            if number > 1:
                events.append(event_from_dict(data))
            elif data.get("format") != FORMAT:
                raise ValueError(f"its first line does not say {FORMAT}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a minipaged recording ({error})") from error
    if not lines:
        raise ValueError(f"{path} is empty, not a minipaged recording")
    return events


def replay(events: Iterable[Event]) -> Iterator[State]:
    """Yields the (one, changing) `State` after each event."""
    state = State()
    for event in events:
        state.apply(event)
        yield state
