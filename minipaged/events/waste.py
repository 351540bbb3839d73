"""Memory waste by the paper's classes, and what other memory managers would reserve for the same sequences.

Every slot that a manager reserves for a sequence belongs to one class (paper §3.1, Fig. 2 and 3):

    token      holds the KV of a token
    reserved   will hold one later, and is unavailable until then
    internal   never holds one, because the sequence ends before; known only when it has ended
    external   the difference between the requested size and the size of the allocated chunk

Contiguous managers must reserve a sequence's final length when it starts, but it is not known yet: *Max* reserves the
longest possible, *Pow2* rounds the output up to a power of two, *Oracle* is given the true length. Their chunks are
whole blocks from a buddy allocator, which rounds up to a power of two: Pow2 and Oracle lose the rest to *external*.
FasterTransformer reserves as Max. vAttention maps page-groups as a sequence grows. None of them shares prompts.

`features.contiguous` and `features.vattention` implement these managers; `Engine.held` measures the running one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minipaged.events.reducer import State
from minipaged.events.types import Event, Finished, StepFinished

AHEAD = ("orca-max", "orca-pow2", "orca-oracle")  # managers that reserve ahead
MANAGERS = (*AHEAD, "vattention", "paged")


class Held(NamedTuple):
    """Numbers of reserved slots, by class."""

    token: int = 0
    reserved: int = 0
    internal: int = 0
    external: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def __add__(self, other: tuple[int, ...]) -> Held:  # type: ignore[override]
        return Held(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Progress:
    """A sequence at one step: prompt tokens, tokens with KV in the cache, and how many of those it will reach."""

    seq_id: int
    num_prompt: int
    num_computed: int
    final: int


def progress_of(seq: Any, max_output: int) -> Progress:
    """A sequence now, assuming that it generates ``max_output`` tokens. The KV of the last one is never computed."""
    return Progress(seq.seq_id, seq.num_prompt, seq.num_computed, seq.num_prompt + max_output - 1)


def held_now(engine: Any) -> Held:
    """The slots of an engine's pool by class, assuming that each sequence generates as many tokens as it may."""
    scheduler = engine.scheduler
    progress = [
        progress_of(seq, request.max_output) for request in scheduler.running for seq in scheduler.active(request)
    ]
    held: Held = engine.memory.held(progress, scheduler.demand(scheduler.waiting[0]) if scheduler.waiting else None)
    return held


def held_in_blocks(
    tables: Mapping[int, list[int]], pinned: Iterable[int], block_size: int, progress: Iterable[Progress]
) -> Held:
    """The slots of the blocks in these sequences' block tables, by class; shared blocks count once.

    ``pinned`` blocks are full, and count as used even if no table has them.
    """
    filled = dict.fromkeys(pinned, block_size)
    coming = dict(filled)
    for seq in progress:
        for logical, block in enumerate(tables[seq.seq_id]):
            here = max(0, min(block_size, seq.num_computed - logical * block_size))
            later = max(here, min(block_size, seq.final - logical * block_size))
            filled[block] = max(filled.get(block, 0), here)
            coming[block] = max(coming.get(block, 0), later)
    token, final = sum(filled.values()), sum(coming.values())
    return Held(token, final - token, len(filled) * block_size - final)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def longest_reservation(max_model_len: int, num_blocks: int, block_size: int) -> int:
    """Slots that *Max* reserves for a sequence: ``max_model_len``, but not more than the whole pool."""
    return min(max_model_len, num_blocks * block_size)


def reservation(manager: str, num_prompt: int, num_output: int, longest: int) -> int:
    """Slots that a contiguous manager reserves when a sequence starts that will generate ``num_output`` tokens.

    At least what it needs, which is its number of tokens minus one: the KV of the last token is never computed.
    """
    needed = num_prompt + num_output - 1
    if manager == "orca-max":
        return max(longest, needed)
    if manager == "orca-pow2":
        return max(min(num_prompt + next_power_of_two(num_output), longest), needed)
    if manager == "orca-oracle":
        return needed
    raise ValueError(f"{manager!r} reserves nothing ahead")


def held(manager: str, seq: Progress, longest: int, page_tokens: int, block_size: int = 1) -> Held:
    """The slots that ``manager`` reserves for one sequence, in chunks of blocks of ``block_size`` slots.

    ``longest``: slots that Max reserves. ``page_tokens``: tokens per vAttention page-group.
    """
    token = seq.num_computed
    if manager == "vattention":
        mapped = -(-token // page_tokens) * page_tokens
        reserved = min(mapped, max(seq.final, token)) - token
        return Held(token, reserved, mapped - token - reserved)
    asked = max(reservation(manager, seq.num_prompt, _num_output(seq.num_prompt, seq.final), longest), token)
    later = max(0, seq.final - token)
    return Held(token, later, asked - token - later, _chunk(manager, asked, block_size) - asked)


def _num_output(num_prompt: int, final: int) -> int:
    """Tokens that a sequence has generated when it ends with the KV of ``final`` tokens in the cache."""
    return max(0, final + 1 - num_prompt)


def _chunk(manager: str, asked: int, block_size: int) -> int:
    """Slots of the allocated chunk. Max always reserves the same size, so its pool is cut into exact pieces."""
    blocks = -(-asked // block_size)
    return block_size * (blocks if manager == "orca-max" else next_power_of_two(blocks))


def fitting(
    manager: str, progress: Iterable[Progress], slots: int, longest: int, page_tokens: int, block_size: int = 1
) -> int:
    """How many of these sequences, in order, an empty pool of ``slots`` could serve at once.

    A sum is exact for a buddy allocator, too: until a chunk is freed, no two of its free pieces have the same
    length, so the pieces that are shorter than a chunk add up to less than one chunk.
    """
    return _count_fitting((held(manager, seq, longest, page_tokens, block_size).total for seq in progress), slots)


def _count_fitting(needs: Iterable[int], slots: int) -> int:
    count = 0
    for need in needs:
        slots -= need
        if slots < 0:
            break
        count += 1
    return count


@dataclass
class Row:
    """One seq of a `timeline`. ``running``: sequences with blocks; ``fit``: how many of them a pool of the same
    size could serve at once, first come, first served."""

    step: int
    running: int
    held: dict[str, Held]
    fit: dict[str, int]


class _Terms(NamedTuple):
    """A sequence's reservation by each contiguous manager, decided once: slots requested and slots allocated."""

    final: int
    asked: tuple[int, ...]
    chunk: tuple[int, ...]


class _Shot(NamedTuple):
    """The data from which a row is computed, and computed again when final lengths become known."""

    step: int
    running: list[tuple[int, int]]  # (sequence, its tokens in the cache)
    filled: dict[int, int]  # block that is not full → its filled slots
    num_full: int  # number of full blocks
    open: list[tuple[int, int, int]]  # (block that is not full, a sequence that reads it, its first position there)


class Accounts:
    """Computes the `timeline` of a run while it is running.

    `apply` every event, `close` a row whenever you want one, and read the ``rows`` by number after an `update`. An
    unfinished sequence is assumed to run to its limit; if it ends earlier, the rows in which it was running change.
    To keep this cheap, a row is a sum over sequences of numbers that are computed once.
    """

    def __init__(self, state: State | None = None, first: int = 0, page_tokens: int = 64) -> None:
        self.state = state or State()
        self.rows: dict[int, Row] = {}
        self.next = first  # the number of the next row
        self.page_tokens = page_tokens
        self._shots: dict[int, _Shot] = {}
        self._terms: dict[int, _Terms] = {}
        self._since: dict[int, int] = {}  # the first row in which a sequence is running
        self._stale: set[int] = set()

    def apply(self, event: Event) -> None:
        self.state.apply(event)
        if isinstance(event, Finished) and event.seq_id in self._terms:
            seq = self.state.seqs[event.seq_id]
            # The last token's KV is never computed: no later token attends to it.
            terms = self._agree(seq.num_prompt, max(len(seq.tokens) - 1, seq.num_computed))
            if terms != self._terms[event.seq_id]:
                self._stale.update(range(self._since[event.seq_id], self.next))
            self._terms[event.seq_id] = terms

    def close(self) -> None:
        """Adds a row: the slots that are reserved now."""
        shot = self._shot()
        for seq_id, _ in shot.running:
            if seq_id not in self._terms:
                seq = self.state.seqs[seq_id]
                self._terms[seq_id] = self._agree(
                    seq.num_prompt, max(min(seq.limit - 1, self._longest), seq.num_computed)
                )
                self._since[seq_id] = self.next
        self._shots[self.next] = shot
        self._stale.add(self.next)
        self.next += 1

    def update(self) -> list[int]:
        """Computes the rows that are new or changed since the last call; returns their numbers."""
        changed = sorted(self._stale & self._shots.keys())
        self._stale.clear()
        for number in changed:
            self.rows[number] = self._row(self._shots[number])
        return changed

    def forget(self, before: int) -> None:
        """Drops the rows with numbers below ``before``."""
        for number in [number for number in self._shots if number < before]:
            del self._shots[number]
            self.rows.pop(number, None)

    @property
    def _longest(self) -> int:
        config = self.state.config
        return longest_reservation(config["max_model_len"], config["num_blocks"], config["block_size"])

    def _agree(self, num_prompt: int, final: int) -> _Terms:
        longest, num_output = self._longest, _num_output(num_prompt, final)
        asked = tuple(max(reservation(manager, num_prompt, num_output, longest), final) for manager in AHEAD)
        chunks = (_chunk(manager, n, self.state.config["block_size"]) for manager, n in zip(AHEAD, asked, strict=True))
        return _Terms(final, asked, tuple(chunks))

    def _shot(self) -> _Shot:
        size, ahead = self.state.config["block_size"], self.state.config.get("memory") in AHEAD
        running: list[tuple[int, int]] = []
        full: set[int] = set()
        filled: dict[int, int] = {}
        open_blocks: list[tuple[int, int, int]] = []
        for seq_id, seq in self.state.seqs.items():
            if not seq.table:
                continue
            running.append((seq_id, seq.num_computed))
            num_full = seq.num_computed // size
            full.update(seq.table[:num_full])
            # A manager that reserves ahead has the whole chunk in the table; paging would hold only the used blocks.
            end = -(-seq.num_computed // size) if ahead else None
            for logical, block in enumerate(seq.table[num_full:end], start=num_full):
                start = logical * size
                filled[block] = max(filled.get(block, 0), seq.num_computed - start)
                open_blocks.append((block, seq_id, start))
        for block in full & filled.keys():  # one of the sequences that share it has filled it
            del filled[block]
        return _Shot(self.state.step, running, filled, len(full), [o for o in open_blocks if o[0] in filled])

    def _row(self, shot: _Shot) -> Row:
        config = self.state.config
        slots = config["block_size"] * config["num_blocks"]
        terms = [self._terms[seq_id] for seq_id, _ in shot.running]
        token = sum(num_computed for _, num_computed in shot.running)
        final = sum(term.final for term in terms)
        totals: dict[str, Held] = {}
        fit: dict[str, int] = {}
        for index, manager in enumerate(AHEAD):
            chunks = [term.chunk[index] for term in terms]
            asked = sum(term.asked[index] for term in terms)
            totals[manager] = Held(token, final - token, asked - final, sum(chunks) - asked)
            fit[manager] = _count_fitting(chunks, slots)
        pages = [-(-num_computed // self.page_tokens) * self.page_tokens for _, num_computed in shot.running]
        later = sum(min(page, term.final) for page, term in zip(pages, terms, strict=True)) - token
        totals["vattention"] = Held(token, later, sum(pages) - token - later)
        fit["vattention"] = _count_fitting(pages, slots)
        totals["paged"] = self._paged(shot)
        fit["paged"] = len(shot.running)
        return Row(shot.step, len(shot.running), totals, fit)

    def _paged(self, shot: _Shot) -> Held:
        """The slots that block tables hold: the engine's own tables if it is paged. Shared blocks count once."""
        size = self.state.config["block_size"]
        coming: dict[int, int] = {}
        for block, seq_id, start in shot.open:
            coming[block] = max(coming.get(block, 0), min(size, self._terms[seq_id].final - start))
        token = sum(shot.filled.values())
        reserved = sum(max(0, coming[block] - count) for block, count in shot.filled.items())
        return Held(token + shot.num_full * size, reserved, len(shot.filled) * size - token - reserved)


def timeline(events: Iterable[Event], page_tokens: int = 64) -> list[Row]:
    """One row per step: the slots that each manager would reserve for the sequences that were running."""
    accounts = Accounts(page_tokens=page_tokens)
    for event in events:
        accounts.apply(event)
        if isinstance(event, StepFinished):
            accounts.close()
    accounts.update()
    return list(accounts.rows.values())
