"""Lab A4: fork and copy-on-write.

Its reference is a twin of `core.block_table.BlockTables`, which reserves many tokens at a time, emits events
and caches prefixes. The engine's tables pass the same checks.
"""

from __future__ import annotations

from typing import Any

from minipaged.core import block_table
from minipaged.core.plan import Copy, Write
from minipaged.events import EventLog
from minipaged.labs.lab import Lab, Mutant, Source, Task


def engine() -> dict[str, Any]:
    """The engine's block tables, asked for one token at a time."""

    class Tables:
        def __init__(self, block_size: int, pool: Any) -> None:
            self.engine = block_table.BlockTables(0, block_size, EventLog(), enable_prefix_caching=False)
            self.engine.pool = _Pool(pool)  # type: ignore[assignment]
            self.lengths: dict[int, int] = {}

        def open(self, seq: int) -> None:
            self.engine.open(seq)
            self.lengths[seq] = 0

        def fork(self, parent: int, child: int) -> None:
            self.engine.fork(parent, child)
            self.lengths[child] = self.lengths[parent]

        def append_slot(self, seq: int) -> Copy | None:
            copies = self.engine.reserve(Write(seq, self.lengths[seq], self.lengths[seq] + 1))
            self.lengths[seq] += 1
            return copies[0] if copies else None

        def free(self, seq: int) -> None:
            self.engine.free(seq)
            del self.lengths[seq]

        def all_tables(self) -> list[tuple[int, list[int], int]]:
            return [(seq, list(blocks), self.lengths[seq]) for seq, blocks in self.engine.tables.items()]

    return {"BlockTables": Tables}


class _Pool:
    """The pool of the checks, under the engine's names."""

    def __init__(self, pool: Any) -> None:
        self.allocate, self.share, self.free, self._pool = pool.allocate, pool.incref, pool.decref, pool

    @property
    def ref_counts(self) -> Any:
        return self

    def __getitem__(self, block: int) -> int:
        return self._pool.ref_count(block)


MUTANTS = (
    Mutant(
        "a sequence writes to a block that others read: their text changes",
        "A4.3",
        "        elif self.pool.ref_count(table[logical]) > 1:",
        "        elif False:",
    ),
    Mutant(
        "the copy's source keeps the reference of who has left it: it never becomes free",
        "A4.3",
        "            self.pool.decref(src)\n",
        "",
    ),
    Mutant(
        "the source is given up before there is a block to copy it to: when there is none, its count is wrong",
        "A4.3",
        "            src, dst = table[logical], self.pool.allocate()\n            self.pool.decref(src)\n",
        "            src = table[logical]\n            self.pool.decref(src)\n            dst = self.pool.allocate()\n",
    ),
    Mutant(
        "the last owner copies too, though nobody else reads the block any more",
        "A4.1",
        "self.pool.ref_count(table[logical]) > 1:",
        "self.pool.ref_count(table[logical]) >= 1:",
    ),
    Mutant(
        "a fork shares blocks without counting: they are freed while it reads them",
        "A4.2",
        "            self.pool.incref(block)",
        "            pass",
    ),
    Mutant(
        "parent and child share one list as their block table",
        "A4.2",
        "self.tables[child] = list(self.tables[parent])",
        "self.tables[child] = self.tables[parent]",
    ),
)

LAB = Lab(
    key="A4",
    title="Fork and copy-on-write",
    minutes=60,
    file="tables.py",
    sources=(Source("minipaged.labs.a4.reference"),),
    tasks=(
        Task("A4.1", "Grow a block table", 2),
        Task("A4.2", "Fork", 2, needs=("A4.1",)),
        Task("A4.3", "Copy on write", 4, needs=("A4.2",)),
        Task("A4.4", "Run in the engine", 2, needs=("A4.3",)),
    ),
    mutants=MUTANTS,
    engine=engine,
)
