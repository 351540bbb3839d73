"""Block tables: for each sequence, which physical block holds which of its tokens (paper §4.2).

Token i of a sequence lives in entry i // block_size of its table, at offset i % block_size. Tables grow at their end,
only as far as the tokens need; so a sequence wastes less than one block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from minipaged.core.plan import Copy, Write
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import EMPTY_PREFIX, EvictionPolicy, Hit, PrefixCache
from minipaged.errors import BlockError, InvariantViolation  # typed errors
from minipaged.events import Allocated, Copied, EventLog, Freed, Shared  # see events/
from minipaged.events.waste import Held, Progress, held_in_blocks  # Held: slots by class; Progress: a sequence's length


class Demand(NamedTuple):
    """What a request asks of memory.

    ``lengths``: the known tokens of each sequence that it may have running. ``common``: the tokens that all of these
    have in common. For managers that reserve ahead: the prompt's length, and the tokens that each may generate.
    """

    lengths: list[int]
    common: int
    num_prompt: int
    max_output: int


class BlockTables:
    """The paged memory manager: all block tables over one pool. Only features use `trim` (speculation), `attach`
    (swap), `prefix` and ``pinned`` (batches in groups) and `prepare_fork` (forks by hand)."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        events: EventLog | None = None,
        enable_prefix_caching: bool = True,
        policy: EvictionPolicy | None = None,
    ) -> None:
        self.block_size = block_size
        self.events = EventLog() if events is None else events
        self.prefix_cache = PrefixCache(self.events, policy) if enable_prefix_caching else None
        self.pool = BlockPool(num_blocks, self.prefix_cache)
        self.tables: dict[int, list[int]] = {}
        self.pinned: Counter[int] = Counter()  # full block → references that a stage holds, outside all tables
        self._prefixes: dict[int, list[int]] = {}  # seq_id → for each full block, the prefix that ends with it

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens: ceil(num_tokens / block_size)."""
        return -(-num_tokens // self.block_size)

    def blocks_to_hold(self, demand: Demand) -> int:
        """Blocks that a request occupies once all its known tokens and one more per sequence are in place."""
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

    def fits(self, demand: Demand, hits: Seq[Hit] = (), outstanding: int = 0, growth: int = 0) -> bool:
        """Whether the pool has the blocks for a request.

        ``hits``: what `match` found; of these, blocks in use need not be free. ``outstanding``: blocks that
        running requests will still take for their tokens. ``growth``: blocks to leave free for them beyond that.
        """
        in_use = sum(self.pool.ref_counts[hit.block] > 0 for hit in hits)
        return self.blocks_to_hold(demand) - in_use <= self.pool.num_free - outstanding - growth

    def match(self, tokens: Seq[int]) -> list[Hit]:
        """The longest cached prefix of ``tokens``, in whole blocks. Changes nothing.

        Stops short of the last token: only a computed token gives logits, and `Scheduler.commit` forks after a chunk.
        """
        hits: list[Hit] = []
        parent = EMPTY_PREFIX
        for end in range(self.block_size, len(tokens), self.block_size):
            hit = self.prefix_cache and self.prefix_cache.lookup(parent, tuple(tokens[end - self.block_size : end]))
            if not hit:
                break
            hits.append(hit)
            parent = hit.prefix
        return hits

    def open(self, seq_id: int, hits: Seq[Hit] = (), demand: Demand | None = None) -> None:
        """Starts a table with the blocks that `match` found. Paging needs no ``demand``."""
        self._start(seq_id, [hit.prefix for hit in hits])
        for hit in hits:
            self._share(seq_id, hit.block, "prefix")

    def blocks_needed(self, writes: Collection[Write]) -> int:
        """Free blocks that `reserve` will take for all of ``writes``, copies included."""
        return self.count_blocks(writes, self.tables, self.pool)

    def count_blocks(self, writes: Collection[Write], tables: Mapping[int, list[int]], pool: BlockPool) -> int:
        """`blocks_needed`, for the tables and the pool given: `features.swap` asks it for tables that are swapped out.

        The last writer of a shared block needs no copy: by then its reference count is 1.
        """
        grown = 0
        writers: dict[int, int] = {}  # shared block → its writers
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
        written to. Returns those copies; the runner executes them.
        """
        seq_id, start, end = write
        table = self.tables[seq_id]
        copies = []
        for logical in range(start // self.block_size, len(table)):
            src = table[logical]
            if self.pool.ref_counts[src] > 1:
                dst = self.allocate(seq_id, logical)
                self.pool.free(src)
                table[logical] = dst
                copies.append(Copy(src, dst))
                self.events.emit(Copied, seq_id, logical, src, dst)
        while len(table) < self.blocks_for(end):
            block = self.allocate(seq_id, len(table))
            self.events.emit(Allocated, seq_id, len(table), block)
            table.append(block)
        return copies

    def allocate(self, seq_id: int, logical: int) -> int:
        """A block for this entry of the table. Any block will do; a subclass may prefer one."""
        return self.pool.allocate()

    def mark_computed(self, seq_id: int, tokens: Seq[int], num_computed: int) -> None:
        """The KV of the first ``num_computed`` tokens is in place: full blocks enter the prefix cache.

        Only now, not when they were reserved: a block must never be found before its KV exists.
        """
        if not self.prefix_cache:
            return
        prefixes, table = self._prefixes[seq_id], self.tables[seq_id]
        while (len(prefixes) + 1) * self.block_size <= num_computed:
            start = len(prefixes) * self.block_size
            parent = prefixes[-1] if prefixes else EMPTY_PREFIX
            content = tuple(tokens[start : start + self.block_size])
            prefixes.append(self.prefix_cache.insert(parent, content, table[len(prefixes)]))

    def trim(self, seq_id: int, num_tokens: int) -> list[int]:
        """Frees the blocks after those of the first ``num_tokens`` tokens; returns them, tail first.

        Only for blocks that `reserve` took in this step: no one shares them yet, and the cache does not know them.
        """
        table, blocks = self.tables[seq_id], list[int]()
        while len(table) > self.blocks_for(num_tokens):
            blocks.append(table.pop())
            self.pool.free(blocks[-1])
        return blocks

    def prepare_fork(self, seq_id: int) -> bool:
        """Whether there is room for `fork`: here always, because it takes no block before one of the two writes."""
        return True

    def fork(self, parent: int, child: int) -> None:
        """The child gets the parent's table: every block is shared, nothing is copied (paper §4.4)."""
        self._start(child, list(self._prefixes[parent]))
        for block in self.tables[parent]:
            self._share(child, block, "fork")

    def free(self, seq_id: int) -> None:
        """Frees the whole table, tail before head: the prefix cache evicts in this order, so heads live longest."""
        blocks = self.detach(seq_id)[0][::-1]
        for block in blocks:
            self.pool.free(block)
        self.events.emit(Freed, seq_id, blocks)

    def detach(self, seq_id: int) -> tuple[list[int], list[int]]:
        """Removes a table and returns it with the names of its prefixes. Its references are the caller's now."""
        if seq_id not in self.tables:
            raise BlockError(f"sequence {seq_id} has no block table; was it freed twice?")
        return self.tables.pop(seq_id), self._prefixes.pop(seq_id)

    def attach(self, seq_id: int, table: list[int], prefixes: list[int]) -> None:
        """Undoes `detach`, with other blocks if the content has moved. The caller's references are the table's now."""
        self._start(seq_id, prefixes)
        self.tables[seq_id] += table

    def prefix(self, seq_id: int, num_blocks: int) -> list[Hit]:
        """A table's first blocks, whose KV must be in place, with the names of their prefixes."""
        return [Hit(*pair) for pair in zip(self._prefixes[seq_id][:num_blocks], self.tables[seq_id], strict=False)]

    def held(self, progress: Iterable[Progress], waiting: Demand | None = None) -> Held:
        """The slots of used blocks by class of waste (paper Fig. 2); shared blocks count once. ``waiting``: the next
        request, of which contiguous managers tell whether the free blocks are of use to it."""
        return held_in_blocks(self.tables, self.pinned, self.block_size, progress)

    def check(self, num_computed: Mapping[int, int] | None = None) -> None:
        """Reference counts equal occurrences in tables, and each table has exactly the blocks that its tokens need.

        ``num_computed``: tokens with KV, of every sequence that has a table. Raises `InvariantViolation`.
        """
        for seq_id, count in (num_computed or {}).items():
            if len(self.tables[seq_id]) != self.blocks_for(count):
                raise InvariantViolation(f"{len(self.tables[seq_id])} blocks hold {count} tokens of sequence {seq_id}")
        self.pool.check()
        named = self.pinned + Counter(block for table in self.tables.values() for block in table)
        for block, count in enumerate(self.pool.ref_counts):
            if named[block] != count:
                raise InvariantViolation(f"block {block} is in {named[block]} tables but has {count} references")

    def _start(self, seq_id: int, prefixes: list[int]) -> None:
        if seq_id in self.tables:
            raise BlockError(f"sequence {seq_id} has a block table already")
        self.tables[seq_id], self._prefixes[seq_id] = [], prefixes

    def _share(self, seq_id: int, block: int, reason: str) -> None:
        self.pool.share(block)
        table = self.tables[seq_id]
        self.events.emit(Shared, seq_id, len(table), block, reason)
        table.append(block)
