"""Lab A1: who owns which block of the KV cache.

You write the methods that raise NotImplementedError. README.md, beside this file, says what they must do.
"""

from __future__ import annotations

from collections import deque


class OutOfBlocks(MemoryError):
    """There is no free block."""


class BlockError(RuntimeError):
    """A block is used against its life cycle: freed twice, shared when free, unknown."""


class BlockPool:
    """Hands out block ids 0 … num_blocks − 1 and counts the references to each."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks  # block → how many block tables name it
        self.free_blocks = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` can still hand out."""
        return len(self.free_blocks)

    def allocate(self) -> int:
        """A free block, which has one reference from now on. Raises OutOfBlocks if none is free."""
        if not self.free_blocks:
            raise OutOfBlocks("no free block")
        block = self.free_blocks.popleft()
        self.ref_counts[block] = 1
        return block

    def incref(self, block: int) -> None:
        """One more block table names this block. Raises BlockError if the block is free or unknown."""
        self.ref_counts[block] += 1

    def decref(self, block: int) -> None:
        """One block table less. The last one's block is free again. Raises BlockError if it is free or unknown."""
        self.ref_counts[block] -= 1
        self.free_blocks.append(block)

    def _check_used(self, block: int) -> None:
        """Raises BlockError for what is no block of this pool, and for a block without references."""
        raise NotImplementedError("A1.3")
