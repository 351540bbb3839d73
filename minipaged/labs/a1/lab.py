"""Lab A1: the block allocator.

Its reference is a twin of `core.pool.BlockPool`, which also serves the prefix cache (lab A6) and would show students
branches that this lab does not need. The engine's pool passes the same checks.
"""

from __future__ import annotations

from typing import Any

from minipaged.core.pool import BlockPool
from minipaged.labs.lab import Lab, Mutant, Source, Task


def engine() -> dict[str, Any]:
    """The engine's pool, under this lab's names for its methods."""

    class Pool(BlockPool):
        incref, decref = BlockPool.share, BlockPool.free

    return {"BlockPool": Pool}


MUTANTS = (
    Mutant(
        "a block goes back to the pool with its first owner, though others still read it",
        "A1.2",
        "        if self.ref_counts[block] == 0:\n            self.free_blocks.append(block)",
        "        self.ref_counts[block] = 0\n        self.free_blocks.append(block)",
    ),
    Mutant(
        "a block freed twice is in the pool twice, and later two sequences write to it",
        "A1.3",
        "        if self.ref_counts[block] == 0:\n            raise BlockError",
        "        if self.ref_counts[block] < 0:\n            raise BlockError",
    ),
    Mutant(
        "block -1 stands for no block, and freeing it frees the last one",
        "A1.3",
        "if not 0 <= block < self.num_blocks:",
        "if not block < self.num_blocks:",
    ),
    Mutant(
        "the last block is never handed out",
        "A1.1",
        "if not self.free_blocks:",
        "if len(self.free_blocks) <= 1:",
    ),
    Mutant(
        "a block without owners is forgotten: the pool shrinks until nothing fits",
        "A1.2",
        "            self.free_blocks.append(block)",
        "            pass",
    ),
)

LAB = Lab(
    key="A1",
    title="A block allocator",
    minutes=45,
    file="allocator.py",
    sources=(Source("minipaged.labs.a1.reference"),),
    tasks=(
        Task("A1.1", "Hand out blocks", 2),
        Task("A1.2", "Count references", 3, needs=("A1.1",)),
        Task("A1.3", "Refuse misuse", 3, needs=("A1.2",)),
        Task("A1.4", "Run in the engine", 2, needs=("A1.2",)),
    ),
    mutants=MUTANTS,
    engine=engine,
)
