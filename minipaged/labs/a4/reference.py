"""Lab A4: sequences that share blocks, and copy them before they write.

You write the methods that raise NotImplementedError. README.md, beside this file, says what they must do.

``pool`` is given to you. It has the methods of lab A1, and one more:

    pool.allocate() -> int        a free block, with one reference; raises OutOfBlocks
    pool.incref(block)            one more block table names this block
    pool.decref(block)            one less; without any the block is free
    pool.ref_count(block) -> int  how many do
"""

from __future__ import annotations

from typing import NamedTuple


class OutOfBlocks(MemoryError):
    """There is no free block."""


class CopyOp(NamedTuple):
    """Keys and values of block ``src`` are to be copied to block ``dst`` before anything is written."""

    src: int
    dst: int


class BlockTables:
    """For each sequence its block table: token i lives in block ``tables[seq][i // block_size]``."""

    def __init__(self, block_size: int, pool) -> None:
        self.block_size = block_size
        self.pool = pool
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}  # sequence → how many tokens it has slots for

    def open(self, seq: int) -> None:
        """A sequence begins, without any token."""
        self.tables[seq] = []
        self.lengths[seq] = 0

    def free(self, seq: int) -> None:
        """A sequence ends: it gives up its blocks."""
        for block in reversed(self.tables.pop(seq)):
            self.pool.decref(block)
        del self.lengths[seq]

    def all_tables(self) -> list[tuple[int, list[int], int]]:
        """What the checks look at after every call: sequence, block table, length."""
        return [(seq, table, self.lengths[seq]) for seq, table in self.tables.items()]

    # lab: A4.2
    def fork(self, parent: int, child: int) -> None:
        """The new sequence ``child`` starts as a copy of ``parent``, on the same blocks. Nothing is copied."""
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]
        for block in self.tables[child]:
            self.pool.incref(block)

    # lab: A4.1, A4.3
    def append_slot(self, seq: int) -> CopyOp | None:
        """Makes a slot for one more token, which this sequence alone may write to.

        Returns what must be copied first, or None. If the pool raises OutOfBlocks, so does this, and nothing changes.
        """
        table, logical = self.tables[seq], self.lengths[seq] // self.block_size
        copy = None
        if logical == len(table):
            table.append(self.pool.allocate())
        elif self.pool.ref_count(table[logical]) > 1:
            src, dst = table[logical], self.pool.allocate()
            self.pool.decref(src)
            table[logical] = dst
            copy = CopyOp(src, dst)
        self.lengths[seq] += 1
        return copy
