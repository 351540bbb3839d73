"""The student's block tables inside the real engine, watched at every call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

from minipaged.config import EngineConfig
from minipaged.core.block_table import BlockTables, Demand
from minipaged.core.plan import Copy, Write
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import Hit
from minipaged.errors import InvalidConfig
from minipaged.events import Allocated, Copied, EventLog, Freed, Shared
from minipaged.labs.student import Remote, StudentError, Violation


class Pool:
    """The engine's pool, under the names that the student's code knows."""

    def __init__(self, pool: BlockPool) -> None:
        self.allocate, self.incref, self.decref = pool.allocate, pool.share, pool.free
        self._pool = pool

    def ref_count(self, block: int) -> int:
        return self._pool.ref_counts[block]

    @property
    def num_free(self) -> int:
        return self._pool.num_free


class LabTables(BlockTables):
    """Block tables that the student's code keeps. What they should be is worked out here, and compared at each call."""

    def __init__(self, student: Any, config: EngineConfig, events: EventLog) -> None:
        assert config.num_blocks is not None and config.block_size is not None
        if config.caches_prefixes or config.memory != "paged" or config.preemption != "recompute":
            raise InvalidConfig("lab A4 needs memory='paged', preemption='recompute' and no prefix caching")
        if config.speculate:
            raise InvalidConfig("lab A4's block tables only grow, and rejected tokens take back: leave speculate out")
        super().__init__(config.num_blocks, config.block_size, events, enable_prefix_caching=False)
        pool = Remote("pool", Pool(self.pool), ("allocate", "incref", "decref", "ref_count"), ("num_free",))
        self._theirs = student.new("BlockTables", config.block_size, pool)
        self.lengths: dict[int, int] = {}
        self._said_lengths: dict[int, int] = {}  # by the student's code, with its tables

    def open(self, seq_id: int, hits: Seq[Hit] = (), demand: Demand | None = None) -> None:
        super().open(seq_id)
        self.lengths[seq_id] = 0
        self.ask("open", seq_id)
        self._compare(f"open({seq_id})")

    def fork(self, parent: int, child: int) -> None:
        self.ask("fork", parent, child)
        self.tables[child], self._prefixes[child] = list(self.tables[parent]), []
        self.lengths[child] = self.lengths[parent]
        for logical, block in enumerate(self.tables[child]):
            self.events.emit(Shared, child, logical, block, "fork")
        self._compare(f"fork({parent}, {child})")

    def reserve(self, write: Write) -> list[Copy]:
        copies = [self.append_slot(write.seq_id) for _ in range(self.lengths[write.seq_id], write.end)]
        return [copy for copy in copies if copy]

    def append_slot(self, seq: int) -> Copy | None:
        call, before = f"append_slot({seq})", list(self.pool.ref_counts)
        table, logical = self.tables[seq], self.lengths[seq] // self.block_size
        said = self.ask("append_slot", seq)
        tables = self._read(call)
        theirs = tables.get(seq, [])
        copy = None
        if logical == len(table):
            block = self._fresh(theirs, logical, before, call, "the last block is full, so it needs a new one")
            table.append(block)
            self.events.emit(Allocated, seq, logical, block)
        elif before[table[logical]] > 1:
            src = table[logical]
            if len(theirs) > logical and theirs[logical] == src:
                raise Violation(f"{call} would write to block {src}, which {self._sharers(src)} share", "shared write")
            copy = Copy(src, self._fresh(theirs, logical, before, call, f"block {src} is shared, so it needs a copy"))
            table[logical] = copy.dst
            self.events.emit(Copied, seq, logical, *copy)
        self._compare_copy(said, copy, call)
        self.lengths[seq] += 1
        self._compare(call, tables)
        return copy

    def free(self, seq_id: int) -> None:
        self.ask("free", seq_id)
        blocks = self.tables.pop(seq_id)[::-1]
        del self.lengths[seq_id], self._prefixes[seq_id]
        self.events.emit(Freed, seq_id, blocks)
        self._compare(f"free({seq_id})")

    def ask(self, method: str, *args: int) -> Any:
        """All that the engine asks for is possible: whatever the student's code raises is wrong."""
        try:
            return self._theirs.call(method, *args)
        except StudentError as error:
            raise error.violation() from None

    def compare(self, call: str) -> None:
        """The student's tables and the pool's counts are what they should be, after ``call``."""
        self._compare(call)

    def _sharers(self, block: int) -> str:
        names = [str(seq) for seq, table in self.tables.items() if block in table]
        return f"sequences {', '.join(names[:-1])} and {names[-1]}"

    def _read(self, call: str) -> dict[int, list[int]]:
        said = self.ask("all_tables")
        try:
            tables = {seq: list(table) for seq, table, _ in said}
            assert all(type(number) is int for seq, table in tables.items() for number in (seq, *table))
            self._said_lengths = {seq: length for seq, _, length in said}
        except (TypeError, ValueError, AssertionError):
            raise Violation(f"after {call}, the tables are {said!r}", "table") from None
        return tables

    def _fresh(self, theirs: list[int], logical: int, before: list[int], call: str, why: str) -> int:
        """The block that the student's table has got at ``logical``: one that was free."""
        if len(theirs) <= logical:
            found = f"the table has {len(theirs)} blocks, not {logical + 1}"
            raise Violation(f"after {call}, {found}: {why}", "no new block")
        block = theirs[logical]
        if not 0 <= block < self.pool.num_blocks or before[block] or not self.pool.ref_counts[block]:
            raise Violation(f"{call} took block {block}, which the pool has not just handed out", "not allocated")
        return block

    def _compare_copy(self, said: Any, copy: Copy | None, call: str) -> None:
        wanted = list(copy) if copy else None
        if said == wanted:
            return
        returned = f"CopyOp({', '.join(map(str, said))})" if isinstance(said, list) else repr(said)
        if copy:
            why, rule = f"block {copy.src} must be copied to {copy.dst}", "wrong copy"
        else:
            why, rule = "there is nothing to copy: no other sequence uses its block", "needless copy"
        raise Violation(f"{call} returned {returned}, but {why}", rule)

    def _compare(self, call: str, theirs: dict[int, list[int]] | None = None) -> None:
        theirs = self._read(call) if theirs is None else theirs
        if theirs != self.tables:
            seq = min(seq for seq in {*theirs, *self.tables} if theirs.get(seq) != self.tables.get(seq))
            found = f"{theirs.get(seq)} instead of {self.tables.get(seq)}"
            raise Violation(f"after {call}, the table of sequence {seq} is {found}", "table")
        for seq, length in self.lengths.items():
            if self._said_lengths[seq] != length:
                found = f"{self._said_lengths[seq]} instead of {length}"
                raise Violation(f"after {call}, the length of sequence {seq} is {found}", "length")
        named = Counter(block for table in self.tables.values() for block in table)
        for block, count in enumerate(self.pool.ref_counts):
            if named[block] != count:
                found = f"is in {named[block]} block tables, but has {count} references"
                raise Violation(f"after {call}, block {block} {found}", "references")
