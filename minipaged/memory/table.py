"""Block tables: for each sequence, which physical block holds which of its tokens (paper §4.2).

Token i of a sequence lives in entry i // block_size of its table, at offset i % block_size. Tables grow at their end,
one block at a time, only when the last block is full; so a sequence wastes less than one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, NamedTuple

from minipaged.errors import BlockError, InvariantViolation
from minipaged.events import (
    Allocated,
    Copied,
    Event,
    EventLog,
    Freed,
    PrefixKept,
    PrefixReleased,
    Shared,
    SwappedIn,
    SwappedOut,
)
from minipaged.memory.pool import BlockPool
from minipaged.memory.prefix_cache import EMPTY_PREFIX, EvictionPolicy, PrefixCache
from minipaged.memory.waste import Held, Moment

if TYPE_CHECKING:
    from minipaged.scheduling.plan import StepPlan


class Copy(NamedTuple):
    """Copy-on-write: block ``src`` must be copied to ``dst``, in all layers, before the step's forward pass."""

    src: int
    dst: int


class Write(NamedTuple):
    """Tokens [start, end) of a sequence will be written in this step."""

    seq_id: int
    start: int
    end: int


class Hit(NamedTuple):
    """A cached block that begins a prompt: its prefix's name and the block."""

    prefix: int
    block: int


class Demand(NamedTuple):
    """What a request asks of memory: the known tokens of each sequence it may have running, how many of these all of
    them share, and how many tokens each may generate after its prompt."""

    lengths: list[int]
    common: int
    num_prompt: int
    max_output: int


class BlockTables:
    """The paged memory manager: all block tables over one pool."""

    reserves_ahead = False

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        events: EventLog | None = None,
        enable_prefix_caching: bool = True,
        policy: EvictionPolicy | None = None,
        swap_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self._events = EventLog() if events is None else events
        self._cache = PrefixCache(self._events, policy) if enable_prefix_caching else None
        self.pool = BlockPool(num_blocks, self._cache)
        self.swap_pool = BlockPool(swap_blocks)
        self.tables: dict[int, list[int]] = {}
        self.swapped: dict[int, list[int]] = {}  # tables of swapped-out sequences, in blocks of the swap pool
        self.kept: dict[int, list[Hit]] = {}  # group -> the blocks that it keeps for those of it who are yet to come
        self._prefixes: dict[int, list[int]] = {}  # seq_id -> names of the prefixes that end its full blocks
        self._num_prompt: dict[int, int] = {}  # of sequences of which something is about to be predicted
        self._bits: dict[int, bool] = {}  # what has been predicted of sequences

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens: the ceiling of their quotient."""
        return -(-num_tokens // self.block_size)

    def blocks_to_hold(self, demand: Demand) -> int:
        """Blocks a request occupies once all its known tokens and one more per sequence are in place."""
        shared = demand.common // self.block_size
        return shared + sum(self.blocks_for(length + 1) - shared for length in demand.lengths)

    def refusal(self, demand: Demand) -> str | None:
        """Why even an empty pool could not serve such a request; ``None`` if it could."""
        needed = self.blocks_to_hold(demand)
        if needed <= self.pool.num_blocks:
            return None
        return (
            f"the prompt needs {needed} KV blocks of {self.block_size} tokens with the next token of its "
            f"{len(demand.lengths)} sequence(s), but the pool has {self.pool.num_blocks}; "
            "shorten it or raise num_blocks"
        )

    def fits(self, demand: Demand) -> bool:
        """Whether there are blocks for the request now; what others are about to take is not known here."""
        return self.blocks_to_hold(demand) <= self.pool.num_free

    def match(self, tokens: Seq[int]) -> list[Hit]:
        """The longest cached beginning of ``tokens``, in whole blocks. Changes nothing.

        Stops short of the last token, so that at least one is left to compute: without that there are no logits.
        """
        hits: list[Hit] = []
        parent = EMPTY_PREFIX
        for end in range(self.block_size, len(tokens), self.block_size):
            found = self._cache and self._cache.lookup(parent, tuple(tokens[end - self.block_size : end]))
            if not found:
                break
            hits.append(Hit(*found))
            parent = found[0]
        return hits

    def open(self, seq_id: int, hits: Seq[Hit] = (), demand: Demand | None = None) -> None:
        """Starts a table, with the blocks that `match` found. What the request will demand does not matter yet."""
        if seq_id in self.tables:
            raise BlockError(f"sequence {seq_id} has a block table already")
        self.tables[seq_id] = []
        self._prefixes[seq_id] = [hit.prefix for hit in hits]
        if demand is not None and self._cache and self._cache.predicts:
            self._num_prompt[seq_id] = demand.num_prompt
        for hit in hits:
            self._share(seq_id, hit.block, "prefix")

    def blocks_needed(self, writes: Collection[Write]) -> int:
        """Free blocks that `reserve` will take for all of ``writes``, copies included.

        Of a shared block's owners the last to write needs no copy: by then it is the only one.
        """
        return self._needed(writes, self.tables, self.pool)

    def _needed(self, writes: Collection[Write], tables: dict[int, list[int]], pool: BlockPool) -> int:
        grown = 0
        writers: dict[int, int] = {}  # of the shared blocks; what has one owner is written in place
        for seq_id, start, end in writes:
            table = tables[seq_id]
            grown += self.blocks_for(end) - len(table)
            for block in table[start // self.block_size :]:
                if pool.ref_counts[block] > 1:
                    writers[block] = writers.get(block, 0) + 1
        if writers:
            grown += sum(min(count, pool.ref_counts[block] - 1) for block, count in writers.items())
        return grown

    def reserve(self, write: Write) -> list[Copy]:
        """Makes the slots of tokens [start, end) writable by this sequence alone.

        This is the one place of copy-on-write: a block that others also name is replaced by a copy before it is
        written to. Returns those copies; executing them is the runner's part.
        """
        seq_id, start, end = write
        table = self.tables[seq_id]
        copies = []
        for logical in range(start // self.block_size, len(table)):
            src = table[logical]
            if self.pool.ref_counts[src] > 1:
                dst = self._allocate(seq_id, logical)
                self.pool.free(src)
                table[logical] = dst
                copies.append(Copy(src, dst))
                self._events.emit(Copied, seq_id, logical, src, dst)
        while len(table) < self.blocks_for(end):
            block = self._allocate(seq_id, len(table))
            self._events.emit(Allocated, seq_id, len(table), block)
            table.append(block)
        return copies

    def _allocate(self, seq_id: int, logical: int) -> int:
        """A block for this entry of the table. To paging one is as good as another."""
        return self.pool.allocate()

    def computed(self, seq_id: int, tokens: Seq[int], num_computed: int) -> None:
        """Tells that the KV of the first ``num_computed`` tokens is in place: full blocks become findable.

        Only now, not when they were reserved: a block must never be found before its KV exists.
        """
        if not self._cache:
            return
        if seq_id in self._num_prompt:
            self._bits[seq_id] = self._cache.predict(tokens[: self._num_prompt.pop(seq_id)])
        prefixes, table = self._prefixes[seq_id], self.tables[seq_id]
        while (len(prefixes) + 1) * self.block_size <= num_computed:
            start = len(prefixes) * self.block_size
            parent = prefixes[-1] if prefixes else EMPTY_PREFIX
            content = tuple(tokens[start : start + self.block_size])
            prefixes.append(self._cache.insert(parent, content, table[len(prefixes)]))

    def trim(self, seq_id: int, num_tokens: int) -> list[int]:
        """Gives up the blocks behind those of the first ``num_tokens`` tokens, and returns them, tail first.

        Only for what `reserve` took in this step: nobody shares it yet, and nobody can have found it.
        """
        table, blocks = self.tables[seq_id], list[int]()
        while len(table) > self.blocks_for(num_tokens):
            blocks.append(table.pop())
            self.pool.free(blocks[-1])
        return blocks

    def seal(self, plan: StepPlan) -> None:
        """Paging asks nothing more of the runner."""

    def prepare_fork(self, seq_id: int) -> bool:
        """A fork takes no block before one of the two writes; should there be none then, somebody is preempted."""
        return True

    def fork(self, parent: int, child: int) -> None:
        """The child gets the parent's table: every block is shared, nothing is copied (paper §4.4)."""
        if child in self.tables:
            raise BlockError(f"sequence {child} has a block table already")
        self.tables[child] = []
        self._prefixes[child] = list(self._prefixes[parent])
        if parent in self._bits:
            self._bits[child] = self._bits[parent]
        for block in self.tables[parent]:
            self._share(child, block, "fork")

    def free(self, seq_id: int) -> None:
        """Gives up the whole table, tail before head: the blocks most worth keeping are freed, so evicted, last."""
        if seq_id in self.tables:
            tables, pool = self.tables, self.pool
        elif seq_id in self.swapped:
            tables, pool = self.swapped, self.swap_pool
        else:
            raise BlockError(f"sequence {seq_id} has no block table; was it freed twice?")
        blocks = tables.pop(seq_id)[::-1]
        del self._prefixes[seq_id]
        self._note(seq_id, blocks if pool is self.pool else [])
        for block in blocks:
            pool.free(block)
        self._events.emit(Freed, seq_id, blocks)

    def _note(self, seq_id: int, blocks: list[int]) -> None:
        """The sequence gives these blocks up: what was predicted of its request stays with them.

        Also when it is preempted and will come back soon; a 1 is wrong for that while.
        """
        self._num_prompt.pop(seq_id, None)
        bit = self._bits.pop(seq_id, None)
        if self._cache and bit is not None and blocks:
            self._cache.note(blocks, bit)

    def keep(self, group: int, seq_id: int, num_blocks: int) -> None:
        """The group becomes one more owner of the first blocks of a table, whose KV must be in place."""
        names, table = self._prefixes[seq_id][:num_blocks], self.tables[seq_id][:num_blocks]
        self.kept[group] = [Hit(*pair) for pair in zip(names, table, strict=True)]
        for block in table:
            self.pool.share(block)
        self._events.emit(PrefixKept, group, table)

    def release(self, group: int) -> None:
        """The group gives up what it has kept, if anything, tail before head."""
        blocks = [hit.block for hit in reversed(self.kept.pop(group, []))]
        for block in blocks:
            self.pool.free(block)
        if blocks:
            self._events.emit(PrefixReleased, group, blocks)

    def can_swap_out(self, seq_ids: Seq[int]) -> bool:
        """Whether there is a swap space and it can take these sequences' blocks, each of which moves once."""
        return (
            self.swap_pool.num_blocks > 0
            and len({block for seq_id in seq_ids for block in self.tables[seq_id]}) <= self.swap_pool.num_free
        )

    def swap_out(self, seq_ids: Seq[int]) -> list[Copy]:
        """Moves whole tables to the swap space (paper §4.5). Returns the copies pool → swap space."""
        return self._move(seq_ids, self.tables, self.pool, self.swapped, self.swap_pool, SwappedOut)

    def swap_in(self, seq_ids: Seq[int]) -> list[Copy]:
        """Moves them back, to whatever blocks are free now. Returns the copies swap space → pool."""
        return self._move(seq_ids, self.swapped, self.swap_pool, self.tables, self.pool, SwappedIn)

    def blocks_needed_to_swap_in(self, writes: Seq[Write]) -> int:
        """Free blocks that swapping these sequences in and then reserving ``writes`` takes.

        Counting the next token too keeps a sequence from being swapped in only to be thrown out at once.
        """
        moved = {block for write in writes for block in self.swapped[write.seq_id]}
        return len(moved) + self._needed(writes, self.swapped, self.swap_pool)

    def held(self, moments: Iterable[Moment]) -> Held:
        """The slots of used blocks, by class of waste (paper Fig. 2); shared ones count once."""
        size = self.block_size
        filled: dict[int, int] = {}
        coming: dict[int, int] = {}
        for moment in moments:
            for logical, block in enumerate(self.tables[moment.seq_id]):
                here = max(0, min(size, moment.num_computed - logical * size))
                later = max(here, min(size, moment.final - logical * size))
                filled[block] = max(filled.get(block, 0), here)
                coming[block] = max(coming.get(block, 0), later)
        for hits in self.kept.values():
            filled |= {hit.block: size for hit in hits}
            coming |= {hit.block: size for hit in hits}
        token, final = sum(filled.values()), sum(coming.values())
        return Held(token, final - token, len(filled) * size - final)

    def check(self, num_computed: Mapping[int, int] | None = None) -> None:
        """Reference counts equal occurrences in tables, and no table is longer than its tokens need.

        ``num_computed``: tokens with KV, of every sequence that has a table. Raises `InvariantViolation`.
        """
        for seq_id, count in (num_computed or {}).items():
            if len(self.tables[seq_id]) != self.blocks_for(count):
                raise InvariantViolation(f"{len(self.tables[seq_id])} blocks hold {count} tokens of sequence {seq_id}")
        kept = [hit.block for hits in self.kept.values() for hit in hits]
        for pool, tables, others in ((self.pool, self.tables, kept), (self.swap_pool, self.swapped, [])):
            pool.check()
            named = Counter(others) + Counter(block for table in tables.values() for block in table)
            for block, count in enumerate(pool.ref_counts):
                if named.get(block, 0) != count:
                    raise InvariantViolation(f"block {block} is in {named[block]} tables but has {count} references")

    def _move(
        self,
        seq_ids: Seq[int],
        tables: dict[int, list[int]],
        pool: BlockPool,
        to_tables: dict[int, list[int]],
        to_pool: BlockPool,
        event: type[Event],
    ) -> list[Copy]:
        """A block that several of the sequences share moves once, and is shared there as it was here."""
        moves: dict[int, int] = {}
        for seq_id in seq_ids:
            table = tables.pop(seq_id)
            for block in table:
                if block in moves:
                    to_pool.share(moves[block])
                else:
                    moves[block] = to_pool.allocate()
            to_tables[seq_id] = [moves[block] for block in table]
            for block in reversed(table):
                pool.free(block)
            self._events.emit(event, seq_id, table, list(to_tables[seq_id]))
        return [Copy(src, dst) for src, dst in moves.items()]

    def _share(self, seq_id: int, block: int, reason: str) -> None:
        self.pool.share(block)
        table = self.tables[seq_id]
        self._events.emit(Shared, seq_id, len(table), block, reason)
        table.append(block)
