"""A buddy allocator: neighbouring blocks in chunks whose lengths are powers of two (Knuth, TAOCP vol. 1, §2.5).

A chunk of length n begins at a multiple of n. Cut in two, its halves are each other's *buddies*, found by flipping one
bit of the start; when both are free again they become one chunk. So joining costs no search, and a request pays with
the rest of its power of two: the paper's *external* fragmentation.
"""

from __future__ import annotations

from minipaged.errors import BlockError, InvariantViolation, OutOfBlocks
from minipaged.events.waste import next_power_of_two


class BuddyPool:
    """Chunks of a pool of blocks 0 … num_blocks − 1.

    Lengths are powers of two times ``unit`` blocks. A pool that is none itself is cut into such pieces, the largest
    first; what is left below a unit is never handed out. ``ref_counts[b]``: how many block tables name block b, as
    kept by the manager.
    """

    def __init__(self, num_blocks: int, unit: int = 1) -> None:
        self.num_blocks, self.unit = num_blocks, unit
        self.ref_counts = [0] * num_blocks
        self.chunks: dict[int, int] = {}  # handed out: start -> length; these and all below in units
        self._units = num_blocks // unit
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(self._units.bit_length())}
        start = 0
        for length in reversed(self._free):
            if self._units & length:
                self._free[length].add(start)
                start += length

    @property
    def num_free(self) -> int:
        """Blocks in no chunk that was handed out, usable or not."""
        return self.num_blocks - sum(self.chunks.values()) * self.unit

    def rounded(self, num_blocks: int) -> int:
        """Blocks of the chunk that ``num_blocks`` are given."""
        return self._length(num_blocks) * self.unit

    def capacity(self, num_blocks: int) -> int:
        """How many chunks for ``num_blocks`` the empty pool has room for. (The pieces that are too small for one add up
        to less than one.)"""
        return self._units // self._length(num_blocks)

    def available(self, num_blocks: int) -> int:
        """How many chunks for ``num_blocks`` could be handed out now."""
        length = self._length(num_blocks)
        return sum(free // length * len(starts) for free, starts in self._free.items() if free >= length)

    def allocate(self, num_blocks: int) -> range:
        """A chunk of at least ``num_blocks``: the smallest that is long enough, cut in halves while it can be."""
        length = self._length(num_blocks)
        found = next((free for free, starts in self._free.items() if free >= length and starts), None)
        if found is None:
            raise OutOfBlocks(f"no {length * self.unit} neighbouring blocks are free")
        start = min(self._free[found])
        self._free[found].remove(start)
        while found > length:
            found //= 2
            self._free[found].add(start + found)
        self.chunks[start] = length
        return range(start * self.unit, (start + length) * self.unit)

    def free(self, chunk: range) -> None:
        """Takes a chunk back and joins it with its buddy, that with its own, and so on."""
        start = chunk.start // self.unit
        length = self.chunks.pop(start, 0)
        if length * self.unit != len(chunk):
            raise BlockError(f"blocks {chunk.start} to {chunk.stop - 1} are no chunk of this pool; freed twice?")
        while start ^ length in self._free.get(length, ()):
            self._free[length].remove(start ^ length)
            start &= ~length
            length *= 2
        self._free[length].add(start)

    def check(self) -> None:
        """Chunks and free pieces are aligned, cover the pool once, and no two free buddies are left apart."""
        free = [(start, length) for length, starts in self._free.items() for start in starts]
        end = 0
        for start, length in sorted([*free, *self.chunks.items()]):
            if start != end or start % length or length & (length - 1):
                raise InvariantViolation(f"a piece of {length} at {start} follows one that ends at {end}")
            end = start + length
        if end != self._units:
            raise InvariantViolation(f"the pieces end at {end} of {self._units}")
        apart = [start for start, length in free if start ^ length in self._free[length]]
        if apart:
            raise InvariantViolation(f"free buddies were not joined: {sorted(apart)}")

    def _length(self, num_blocks: int) -> int:
        return next_power_of_two(-(-num_blocks // self.unit))
