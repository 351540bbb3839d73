"""vAttention's memory manager: block tables whose blocks are also mapped, in order, into *slots* of virtual memory.

A running sequence has a slot, a range of addresses long enough for ``max_model_len`` tokens. Its block table says which
page-groups (physical blocks) belong there. More may be mapped there, or for a moment less: `VirtualTables` tracks both
and puts the difference on the step's plan for the runner (vAttention §5.3, §6.1).

Pages of sequences that have ended stay mapped until another sequence needs them (*deferred reclamation*). A new
sequence gets the slot where most of what it needs is mapped already (*best fit*), so it may need no mapping at all.
Only free pages are mapped ahead of need: that never decides which sequence gets memory, only how long it takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from minipaged.core.block_table import BlockTables, Demand
from minipaged.core.plan import Chunk, Copy, StepPlan, Write
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import EvictionPolicy, Hit
from minipaged.core.seams import Stage
from minipaged.errors import InvariantViolation
from minipaged.events import EventLog

STOCKED_PER_STEP = 4  # page-groups mapped into an idle slot per step: spreads the cost of an admission over steps
LOOK_FOR_SPARE = 32  # free pages to try before mapping ahead is given up for this step


class PageMap(NamedTuple):
    """Page-group ``page`` is mapped (or, in a list of unmaps, was mapped) at block ``logical`` of a slot."""

    slot: int
    logical: int
    page: int


@dataclass
class PageMaps:
    """One step's mappings, in the order of execution: ``unmaps`` and ``maps`` before anything else, then ``ahead``,
    which the next step will probably need. With ``background`` the runner maps ``ahead`` while the model computes.
    """

    slots: dict[int, int] = field(default_factory=dict)  # seq_id → slot, for all sequences of this step
    unmaps: list[PageMap] = field(default_factory=list)
    maps: list[PageMap] = field(default_factory=list)  # may replace the page of a place
    ahead_unmaps: list[PageMap] = field(default_factory=list)
    ahead: list[PageMap] = field(default_factory=list)
    background: bool = False
    done: bool = False  # set by the runner; False again if a mapping in the background failed


class PlacingPool(BlockPool):
    """A block pool from which the caller can choose free blocks, because it matters where they are mapped."""

    @property
    def free_blocks(self) -> Iterable[int]:
        """Free blocks, in the order in which `allocate` hands them out."""
        return self._free

    def is_free(self, block: int) -> bool:
        """Whether the block is neither used nor cached."""
        return block in self._free

    def take(self, block: int) -> int:
        """Allocates this block, which must be free."""
        del self._free[block]
        self.ref_counts[block] = 1
        return block

    def prefer(self, block: int) -> None:
        """Makes this free block the next that `allocate` hands out."""
        self._free.move_to_end(block, last=False)

    def spare(self, block: int) -> None:
        """Makes this free block the last that `allocate` hands out."""
        self._free.move_to_end(block)


class SlotMapping(Stage):
    """The stage that puts a step's mappings on its plan, after everything else."""

    def planned(self, plan: StepPlan) -> None:
        self.scheduler.memory.map_slots(plan)


class VirtualTables(BlockTables):
    """The vAttention manager: block tables, and the slots in which their blocks are contiguous.

    ``mapping``: "sync" maps pages when a step needs them; "eager" also maps what the next step will need, and keeps
    pages ready in an idle slot for the next prompt; "async" does that in the background.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        events: EventLog | None = None,
        enable_prefix_caching: bool = True,
        policy: EvictionPolicy | None = None,
        *,
        max_num_seqs: int,
        max_model_len: int,
        mapping: str = "async",
    ) -> None:
        super().__init__(num_blocks, block_size, events, enable_prefix_caching, policy)
        self.pool: PlacingPool = PlacingPool(num_blocks, self.prefix_cache)
        self.mapping = mapping
        self.slots: dict[int, int] = {}  # seq_id → slot
        self.mapped: list[list[int | None]] = [[] for _ in range(max_num_seqs)]  # slot → page at each of its places
        self._width = self.blocks_for(max_model_len)
        self._owners: dict[int, int] = {}  # slot → seq_id
        self._places: list[set[tuple[int, int]]] = [set() for _ in range(num_blocks)]  # page → (slot, logical)
        self._plans: deque[PageMaps] = deque(maxlen=2)  # two, to notice failures in the background too
        self._usual_prompt = 1  # page-groups that the latest prompt took

    # --- slots ------------------------------------------------------------------------------------------------

    def open(self, seq_id: int, hits: Seq[Hit] = (), demand: Demand | None = None) -> None:
        super().open(seq_id, hits, demand)
        if demand is not None:
            self._usual_prompt = self.blocks_for(demand.lengths[0])
            self._settle(seq_id, self._usual_prompt)

    def reserve(self, write: Write) -> list[Copy]:
        if write.seq_id not in self.slots:  # forked, or swapped in
            self._settle(write.seq_id, self.blocks_for(write.end))
        return super().reserve(write)

    def detach(self, seq_id: int) -> tuple[list[int], list[int]]:
        """Also makes the slot idle; its pages stay mapped."""
        if seq_id in self.slots:
            del self._owners[self.slots.pop(seq_id)]
        return super().detach(seq_id)

    def _settle(self, seq_id: int, need: int) -> None:
        """Assigns an idle slot by best fit: most of the ``need`` blocks are mapped already, and least else is."""
        table = self.tables[seq_id]

        def fit(slot: int) -> tuple[int, int, int]:
            mapped = self.mapped[slot]
            ready = sum(
                page == table[logical] if logical < len(table) else page is not None and self.pool.is_free(page)
                for logical, page in enumerate(mapped[:need])
            )
            return ready, -len(mapped), -slot

        slot = max(self._idle_slots(), key=fit)
        self.slots[seq_id] = slot
        self._owners[slot] = seq_id

    def _idle_slots(self) -> list[int]:
        return [slot for slot in range(len(self.mapped)) if slot not in self._owners]

    def allocate(self, seq_id: int, logical: int) -> int:
        """The page that is mapped there already, if it is free; else the pool's next, unmapped ones first."""
        page = self._shown(self.slots[seq_id], logical)
        if page is not None and self.pool.is_free(page):
            return self.pool.take(page)
        return super().allocate(seq_id, logical)

    # --- mapping ----------------------------------------------------------------------------------------------

    def map_slots(self, plan: StepPlan) -> None:
        """Puts on the plan what the runner must map so that the slots of its sequences match their block tables."""
        if not plan.chunks:
            return
        if not all(maps.done for maps in self._plans):
            self._forget()  # a step failed while mapping, so it is unknown what is mapped
        maps = plan.maps = PageMaps(background=self.mapping == "async")
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.num_tokens > 1)  # decodes first, as they will run
        for chunk in chunks:
            slot, table = self.slots[chunk.seq.seq_id], chunk.block_table
            maps.slots[chunk.seq.seq_id] = slot
            if self.mapped[slot][: len(table)] != table:
                for logical, page in enumerate(table):
                    if self._shown(slot, logical) != page:
                        self._map(slot, logical, page, maps.unmaps, maps.maps)
        if self.mapping != "sync":
            self._map_ahead(chunks, maps)
            self._stock(maps)
        self._plans.append(maps)

    def _map_ahead(self, chunks: Seq[Chunk], maps: PageMaps) -> None:
        """Maps a free page behind a last block that fills now; for a prompt, pages for a next chunk of equal length."""
        for chunk in chunks:
            slot, end = maps.slots[chunk.seq.seq_id], chunk.start + chunk.num_tokens
            next_end = min(end + chunk.num_tokens, len(chunk.seq.tokens) + 1)
            for logical in range(len(chunk.block_table), min(self._width, self.blocks_for(next_end))):
                shown = self._shown(slot, logical)
                if shown is not None and self.pool.is_free(shown):
                    continue
                page = self._spare()
                if page is None:
                    return
                self._map(slot, logical, page, maps.ahead_unmaps, maps.ahead)
                self.pool.spare(page)

    def _stock(self, maps: PageMaps) -> None:
        """Maps unmapped pages into the fullest idle slot, until they would be enough for a prompt like the latest."""
        idle = self._idle_slots()
        if not idle:
            return
        slot = max(idle, key=lambda slot: len(self.mapped[slot]))
        for logical in range(len(self.mapped[slot]), self._usual_prompt)[:STOCKED_PER_STEP]:
            page = next(iter(self.pool.free_blocks), None)
            if page is None or self._places[page]:
                return
            self._map(slot, logical, page, maps.ahead_unmaps, maps.ahead)
            self.pool.spare(page)

    def _spare(self) -> int | None:
        """A free page that no running sequence's slot has mapped; ``None`` if a few tries find none."""
        for page in islice(self.pool.free_blocks, LOOK_FOR_SPARE):
            if not any(slot in self._owners for slot, _ in self._places[page]):
                return page
        return None

    def _map(self, slot: int, logical: int, page: int, unmaps: list[PageMap], maps: list[PageMap]) -> None:
        """Maps the page at this place, and unmaps it where no sequence reads it (reclamation on demand)."""
        for other in sorted(self._places[page]):
            if not self._is_read(*other):
                self._show(*other, None)
                unmaps.append(PageMap(*other, page))
        self._show(slot, logical, page)
        maps.append(PageMap(slot, logical, page))

    def _show(self, slot: int, logical: int, page: int | None) -> None:
        mapped = self.mapped[slot]
        mapped.extend([None] * (logical + 1 - len(mapped)))
        old = mapped[logical]
        if old is not None:
            self._places[old].remove((slot, logical))
            if not self._places[old] and self.pool.is_free(old):
                self.pool.prefer(old)
        mapped[logical] = page
        if page is not None:
            self._places[page].add((slot, logical))
        while mapped and mapped[-1] is None:
            mapped.pop()

    def _shown(self, slot: int, logical: int) -> int | None:
        mapped = self.mapped[slot]
        return mapped[logical] if logical < len(mapped) else None

    def _is_read(self, slot: int, logical: int) -> bool:
        """Whether a sequence has tokens there."""
        return slot in self._owners and logical < len(self.tables[self._owners[slot]])

    def _forget(self) -> None:
        """Forgets all mappings, so that they are made again when needed: mapping a page twice does no harm."""
        self._plans.clear()
        self.mapped = [[] for _ in self.mapped]
        self._places = [set() for _ in self._places]

    def check(self, num_computed: Mapping[int, int] | None = None) -> None:
        """Also checks that slots have one owner each, both records of mappings agree, and slots match their tables."""
        super().check(num_computed)
        if {slot: seq_id for seq_id, slot in self.slots.items()} != self._owners:
            raise InvariantViolation(f"slots {self.slots} are owned by {self._owners}")
        for slot, mapped in enumerate(self.mapped):
            for logical, page in enumerate(mapped):
                if page is not None and (slot, logical) not in self._places[page]:
                    raise InvariantViolation(f"page-group {page} has no record of slot {slot}, block {logical}")
        if sum(map(len, self._places)) != sum(page is not None for mapped in self.mapped for page in mapped):
            raise InvariantViolation("a page-group has a record of a place where it is not mapped")
        for seq_id, slot in self._plans[-1].slots.items() if self._plans and self._plans[-1].done else ():
            table = self.tables.get(seq_id, [])
            if self.slots.get(seq_id) == slot and self.mapped[slot][: len(table)] != table:
                raise InvariantViolation(f"slot {slot} shows {self.mapped[slot]}, but sequence {seq_id} has {table}")
