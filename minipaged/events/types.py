"""The event types: one class for each kind of change in the engine.

Ids: ``request_id`` is the caller's string, ``seq_id`` the engine's own number (a request with n samples has n
sequences), ``block`` a physical block, ``logical`` an index into a block table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

FORMAT = "minipaged-recording/1"


@dataclass(frozen=True, slots=True)
class Event:
    """Base class of all events. ``type`` is the name used in JSON."""

    type: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type} | asdict(self)


@dataclass(frozen=True, slots=True)
class EngineStarted(Event):
    """The first event of a run: the engine's settings, such as block size and pool size."""

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
    memory: str = "paged"  # old recordings do not have this field
    batching: str = "continuous"

    @classmethod
    def of(cls, config: Any, bytes_per_block: int) -> EngineStarted:
        """Makes the event from an engine's settings: `CoreConfig`'s, and those that only `EngineConfig` has."""
        names = ("model", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        swaps = getattr(config, "preemption", "recompute") == "swap"
        return cls(
            **{name: getattr(config, name) for name in names},
            enable_prefix_caching=config.caches_prefixes,
            preemption="swap" if swaps else "recompute",
            swap_blocks=config.swap_space(config.num_blocks) if swaps else 0,
            bytes_per_block=bytes_per_block,
            memory=getattr(config, "memory", "paged"),
            batching=getattr(config, "batching", "continuous"),
        )


@dataclass(frozen=True, slots=True)
class RequestAdded(Event):
    """A request joined the waiting queue. ``prompt_pieces`` is the prompt's text, token by token."""

    type: ClassVar[str] = "request_added"
    request_id: str
    seq_ids: list[int]
    prompt_token_ids: list[int]
    prompt_pieces: list[str]
    max_tokens: int
    rank: float | None = None  # its place in all queues before the order of arrival; None: 0


@dataclass(frozen=True, slots=True)
class StepStarted(Event):
    type: ClassVar[str] = "step_started"
    step: int


@dataclass(frozen=True, slots=True)
class Admitted(Event):
    """Waiting → running. ``num_cached`` tokens of ``seq_id`` were hits in the prefix cache."""

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
    """As `Allocated`, but the block was in use already (``reason`` "fork") or in the prefix cache ("prefix")."""

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

    The last ``num_draft`` of them are draft tokens (see `Proposed`).
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
    """The sequence's block table moved back to the device: ``swap_blocks[i]`` to ``blocks[i]``."""

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
    """A full block entered the prefix cache under the name ``prefix``, which identifies all tokens up to its end."""

    type: ClassVar[str] = "cached"
    block: int
    prefix: int
    parent: int


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """An unused block left the prefix cache, to be allocated again. ``reason``: the eviction policy's, in words."""

    type: ClassVar[str] = "evicted"
    block: int
    reason: str = ""  # old recordings do not have this field


@dataclass(frozen=True, slots=True)
class Predicted(Event):
    """A prediction for the cached blocks that a request used: ``discard`` is true if they will not be needed again
    soon, false if they will. Eviction policies use it."""

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
    """A token was appended. ``text`` is the text that it completed (may be empty: half a character).

    ``top`` lists the most likely tokens as [token id, text, log-probability], if the request asked for them. `State`
    does not keep it: five alternatives for every token would make keyframes many times larger.
    """

    type: ClassVar[str] = "sampled"
    seq_id: int
    token_id: int
    text: str
    logprob: float | None
    top: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Proposed(Event):
    """The step also computed these draft tokens, which the sequence may reject (see `Speculated`)."""

    type: ClassVar[str] = "proposed"
    seq_id: int
    token_ids: list[int]
    pieces: list[str]


@dataclass(frozen=True, slots=True)
class Speculated(Event):
    """The first ``accepted`` of ``proposed`` draft tokens were accepted; the others are rejected.

    ``blocks``, which hold only rejected tokens, are freed, tail first; none if the sequence has finished before.
    """

    type: ClassVar[str] = "speculated"
    seq_id: int
    proposed: int
    accepted: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Freed(Event):
    """The sequence freed its whole block table, listed in the order in which it dropped the references (tail first).

    If the sequence was swapped out, these are CPU blocks.
    """

    type: ClassVar[str] = "freed"
    seq_id: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class GroupStarted(Event):
    """Requests of a new batch form a group: the ``num_blocks`` blocks of their shared prefix are computed only once."""

    type: ClassVar[str] = "group_started"
    group: int
    request_ids: list[str]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class PrefixKept(Event):
    """The group's shared prefix has been computed: the group holds a reference to these blocks, in logical order."""

    type: ClassVar[str] = "prefix_kept"
    group: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class PrefixReleased(Event):
    """The group released these blocks (tail first): it has ended, or a request needed the memory."""

    type: ClassVar[str] = "prefix_released"
    group: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class GroupEnded(Event):
    """All requests of the group have finished."""

    type: ClassVar[str] = "group_ended"
    group: int


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """A sequence finished: ``"stop"``, ``"length"``, ``"abort"``, ``"error"``, or ``"pruned"`` for a dropped beam."""

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
    """An error occurred. If a step failed, ``message`` begins with "step": the requests that it was computing were
    aborted. If a request failed alone, ``message`` begins with its id. The engine continues with the others."""

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
