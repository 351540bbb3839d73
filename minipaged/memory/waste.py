"""What other memory managers would hold for the same sequences: the paper's waste taxonomy, as pure accounting.

Every slot that a manager sets aside for a sequence belongs to one class (paper §3.1, Fig. 2 and 3):

    token      holds the KV of a token
    reserved   will hold one later, and is blocked until then
    internal   will never hold one: the sequence ends before; known only when it has ended
    external   lost between what was asked for and what the allocator could give

Contiguous managers must set aside a sequence's final length when it starts, which nobody knows then: *Max* takes the
longest possible, *Pow2* the output rounded up to a power of two, *Oracle* is told the truth. Their chunks come from a
buddy allocator, so Pow2 and Oracle lose the rest of a power of two to *external*. FasterTransformer sets aside what Max
does. vAttention maps page-groups as a sequence grows. None of these can share a prompt between sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from minipaged.events import Event, State, StepFinished

MANAGERS = ("orca-max", "orca-pow2", "orca-oracle", "vattention", "paged")


class Held(NamedTuple):
    """Slots set aside, by class."""

    token: int = 0
    reserved: int = 0
    internal: int = 0
    external: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def __add__(self, other: tuple) -> Held:  # type: ignore[override]
        return Held(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Moment:
    """A sequence at one step: tokens of prompt and output so far in the cache, and the length it will reach."""

    seq_id: int
    num_prompt: int
    num_computed: int
    final: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def reservation(manager: str, num_prompt: int, num_output: int, max_model_len: int) -> int:
    """Slots that a contiguous manager asks for when a sequence starts that will generate ``num_output`` tokens."""
    if manager == "orca-max":
        return max_model_len
    if manager == "orca-pow2":
        return min(num_prompt + next_power_of_two(num_output), max_model_len)
    if manager == "orca-oracle":
        return num_prompt + num_output
    raise ValueError(f"{manager!r} reserves nothing ahead")


def held(manager: str, moment: Moment, max_model_len: int, page_tokens: int) -> Held:
    """What ``manager`` sets aside for one sequence. ``page_tokens``: tokens of a vAttention page-group."""
    token = moment.num_computed
    if manager == "vattention":
        mapped = -(-token // page_tokens) * page_tokens
        reserved = min(mapped, max(moment.final, token)) - token
        return Held(token, reserved, mapped - token - reserved)
    asked = max(reservation(manager, moment.num_prompt, moment.final - moment.num_prompt, max_model_len), token)
    # Max asks for the same size every time, so its allocator cuts the pool into exact pieces.
    chunk = asked if manager == "orca-max" else next_power_of_two(asked)
    later = max(0, moment.final - token)
    return Held(token, later, asked - token - later, chunk - asked)


def held_by_paging(state: State, finals: dict[int, int]) -> Held:
    """What the engine's own block tables hold: shared blocks count once."""
    size = state.config["block_size"]
    filled: dict[int, int] = {}
    coming: dict[int, int] = {}
    for seq_id, seq in state.seqs.items():
        for logical, block in enumerate(seq.table):
            start = logical * size
            filled[block] = max(filled.get(block, 0), min(size, max(0, seq.num_computed - start)))
            coming[block] = max(coming.get(block, 0), min(size, max(0, finals[seq_id] - start)))
    token = sum(filled.values())
    reserved = sum(max(0, coming[block] - filled[block]) for block in filled)
    return Held(token, reserved, len(filled) * size - token - reserved)


def fitting(manager: str, moments: Iterable[Moment], slots: int, max_model_len: int, page_tokens: int) -> int:
    """How many of these sequences, in order, a pool of ``slots`` could serve at once."""
    used = count = 0
    for moment in moments:
        used += held(manager, moment, max_model_len, page_tokens).total
        if used > slots:
            break
        count += 1
    return count


@dataclass
class Row:
    """One step of a `timeline`. ``running``: sequences with blocks; ``fit``: how many of all unfinished ones fit."""

    step: int
    running: int
    held: dict[str, Held]
    fit: dict[str, int]


def timeline(events: Iterable[Event], page_tokens: int = 64) -> list[Row]:
    """Per step, what each manager would hold for the sequences that the engine was running.

    Reads the events twice: a sequence's final length is known once it has finished. One that still runs is taken to
    run to its limit, so rows change, for the better, when it ends earlier.
    """
    events = list(events)
    state = State()
    limits: dict[int, int] = {}
    for event in events:
        state.apply(event)
        if event.type == "request_added":
            for seq_id in event.seq_ids:  # type: ignore[attr-defined]
                limits[seq_id] = len(event.prompt_token_ids) + event.max_tokens  # type: ignore[attr-defined]
        elif event.type == "forked":
            limits.setdefault(event.child, limits[event.parent])  # type: ignore[attr-defined]
    # The last token's KV is never computed: nothing follows that would read it.
    finals = {i: len(seq.tokens) - 1 if seq.finish_reason else limits[i] for i, seq in state.seqs.items()}

    rows: list[Row] = []
    state = State()
    for event in events:
        state.apply(event)
        if isinstance(event, StepFinished):
            rows.append(_row(state, finals, page_tokens))
    return rows


def _row(state: State, finals: dict[int, int], page_tokens: int) -> Row:
    longest, size = state.config["max_model_len"], state.config["block_size"]
    slots = size * state.config["num_blocks"]
    moments = [
        Moment(seq_id, seq.num_prompt, seq.num_computed, finals[seq_id])
        for seq_id, seq in state.seqs.items()
        if not seq.finish_reason
    ]
    running = [moment for moment in moments if state.seqs[moment.seq_id].table]
    totals = {"paged": held_by_paging(state, finals)}
    fit = {"paged": len(running)}
    for manager in MANAGERS[:-1]:
        totals[manager] = sum((held(manager, m, longest, page_tokens) for m in running), Held())
        fit[manager] = fitting(manager, moments, slots, longest, page_tokens)
    return Row(state.step, len(running), totals, fit)
