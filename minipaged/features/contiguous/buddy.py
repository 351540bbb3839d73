"""A buddy allocator: hands out chunks of neighbouring blocks in powers of two (Knuth, TAOCP vol. 1, §2.5).

A chunk of length n begins at a multiple of n. If it is split in two, its halves are each other's *buddies*: their
starts differ in one bit. When both are free again, they are merged. So merging needs no search. The cost is that
lengths are rounded up to a power of two: the paper's *external* fragmentation.
"""

from __future__ import annotations

from minipaged.errors import BlockError, InvariantViolation, OutOfBlocks
from minipaged.events.waste import next_power_of_two


class BuddyPool:
    """A pool of blocks 0 … num_blocks − 1, handed out in chunks.

    Lengths are powers of two times ``unit`` blocks. A pool of any other length is split into such pieces, the largest
    first; a rest shorter than a unit is never handed out. ``ref_counts[b]``: how many block tables contain block b; the
    manager keeps it up to date.
    """

    def __init__(self, num_blocks: int, unit: int = 1) -> None:
        self.num_blocks, self.unit = num_blocks, unit
        self.ref_counts = [0] * num_blocks
        self.chunks: dict[int, int] = {}  # handed out: start → length; here and below in units
        self._units = num_blocks // unit
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(self._units.bit_length())}
        start = 0
        for length in reversed(self._free):
            if self._units & length:
                self._free[length].add(start)
                start += length

    @property
    def num_free(self) -> int:
        """Number of blocks outside the chunks that were handed out, usable or not."""
        return self.num_blocks - sum(self.chunks.values()) * self.unit

    def rounded(self, num_blocks: int) -> int:
        """Number of blocks in the chunk that a request for ``num_blocks`` gets."""
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
        """Hands out the smallest chunk of at least ``num_blocks``; splits the smallest piece that is long enough."""
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
        """Takes a chunk back and merges it with its buddy, the result with its own buddy, and so on."""
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
        """Checks that pieces are aligned and cover the pool once, and that free buddies are merged."""
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
