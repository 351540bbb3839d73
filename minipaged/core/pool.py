"""The physical blocks: which are free, and how many block tables refer to each of the others."""

from __future__ import annotations

from collections import OrderedDict

from minipaged.core.prefix_cache import PrefixCache
from minipaged.errors import BlockError, InvariantViolation, OutOfBlocks  # typed errors


class BlockPool:
    """Hands out block ids 0 … num_blocks − 1 and counts references (paper §4.3, §4.4).

    A block is in one of three states: *free* (its content is of no use), *cached* (no owner, but the prefix cache can
    still find it) or *used* (``ref_counts[block] > 0`` owners). Free and cached blocks can both be handed out:

        free ── allocate ──► used ── free() by the last owner ──► free, or cached if the prefix cache knows it
        cached ── share (a hit) ──► used           cached ── allocate evicts it ──► used

    The prefix cache finds full used blocks, too: *cached* is the state of those without an owner.
    """

    def __init__(self, num_blocks: int, cache: PrefixCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # a queue; a dict, because vAttention takes chosen blocks
        self._cache = cache

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still hand out: free and cached ones."""
        return len(self._free) + (len(self._cache.evictable) if self._cache else 0)

    def allocate(self) -> int:
        """Returns a block with one owner; evicts a cached one if none is free. Raises `OutOfBlocks`."""
        if self._free:
            block = self._free.popitem(last=False)[0]
        elif self._cache and self._cache.evictable:
            block = self._cache.evict()
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are in use")
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds an owner: a fork, or a hit in the prefix cache (which may find the block without any owner)."""
        self._check_known(block)
        if self.ref_counts[block] == 0:
            if not self._cache or block not in self._cache.evictable:
                raise BlockError(f"block {block} is free: there is nothing in it to share")
            self._cache.revive(block)
        self.ref_counts[block] += 1

    def free(self, block: int) -> None:
        """Removes an owner. Without one, the block is free again, or stays cached until it is evicted."""
        self._check_known(block)
        if self.ref_counts[block] == 0:
            raise BlockError(f"block {block} is freed twice")
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            if self._cache and block in self._cache:
                self._cache.retire(block)
            else:
                self._free[block] = None

    def check(self) -> None:
        """Every block is in exactly one state. Raises `InvariantViolation`."""
        cached = self._cache.evictable if self._cache else set()
        used = [block for block, count in enumerate(self.ref_counts) if count > 0]
        if sorted([*self._free, *cached, *used]) != list(range(self.num_blocks)):
            raise InvariantViolation(f"not a partition: free {list(self._free)}, cached {sorted(cached)}, used {used}")

    def _check_known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:  # Python would count a negative one from the end
            raise BlockError(f"block {block} is not one of this pool's {self.num_blocks}")
