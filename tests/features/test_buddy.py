"""The buddy allocator, with orders of calls that hypothesis chooses, and on numbers checked by hand."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minipaged.errors import BlockError, OutOfBlocks
from minipaged.features.contiguous.buddy import BuddyPool


def pieces(num_units):
    """The power-of-two chunks that make up the pool, as (start, length), largest first."""
    found, start = [], 0
    for bit in reversed(range(num_units.bit_length())):
        if num_units >> bit & 1:
            found.append((start, 1 << bit))
            start += 1 << bit
    return found


class BuddyMachine(RuleBasedStateMachine):
    """The model: the allocated chunks, as ranges. They determine every answer of the allocator."""

    @initialize(blocks=st.integers(1, 120), unit=st.integers(1, 7))
    def start(self, blocks, unit):
        self.pool, self.blocks, self.unit = BuddyPool(blocks, unit), blocks, unit
        self.chunks: list[range] = []

    def free_places(self, length):
        """Aligned starts for a chunk of ``length`` units inside one piece of the pool that overlap no other chunk."""
        taken = {block // self.unit for chunk in self.chunks for block in chunk}
        return [
            place
            for start, size in pieces(self.blocks // self.unit)
            for place in range(start, start + size, length)
            if length <= size and not taken & set(range(place, place + length))
        ]

    @rule(wanted=st.integers(1, 40))
    def allocate(self, wanted):
        length = 1 << (-(-wanted // self.unit) - 1).bit_length()
        places = self.free_places(length)
        assert self.pool.available(wanted) == len(places)
        if not places:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(wanted)
            return
        chunk = self.pool.allocate(wanted)
        assert len(chunk) == length * self.unit == self.pool.rounded(wanted) >= wanted
        assert chunk.start % self.unit == 0 and chunk.start // self.unit in places
        self.chunks.append(chunk)

    @precondition(lambda self: self.chunks)
    @rule(pick=st.integers(0, 99))
    def free(self, pick):
        chunk = self.chunks.pop(pick % len(self.chunks))
        self.pool.free(chunk)
        with pytest.raises(BlockError):
            self.pool.free(chunk)

    @rule()
    def free_all(self):
        """Frees all chunks: they merge, so the largest piece of the pool can be allocated again."""
        for chunk in self.chunks:
            self.pool.free(chunk)
        self.chunks = []
        if whole := pieces(self.blocks // self.unit):
            longest = whole[0][1] * self.unit
            chunk = self.pool.allocate(longest)
            assert chunk == range(longest)
            self.pool.free(chunk)

    @invariant()
    def no_two_chunks_meet_and_what_is_free_is_known(self):
        self.pool.check()
        blocks = [block for chunk in self.chunks for block in chunk]
        assert len(set(blocks)) == len(blocks) and max(blocks, default=0) < self.blocks
        assert self.pool.num_free == self.blocks - len(blocks)
        if not self.chunks:
            assert self.pool.available(1) == self.pool.capacity(1) == self.blocks // self.unit


TestBuddy = BuddyMachine.TestCase
TestBuddy.settings = settings(derandomize=True, deadline=None, database=None, max_examples=100, stateful_step_count=40)


def test_983_blocks_are_seven_chunks_of_128_and_87_that_fit_nobody():
    pool = BuddyPool(983, unit=128)
    assert pool.capacity(128) == 7
    chunks = [pool.allocate(128) for _ in range(7)]
    assert {len(chunk) for chunk in chunks} == {128} and pool.num_free == 87
    with pytest.raises(OutOfBlocks, match="128 neighbouring blocks"):
        pool.allocate(1)
    pool.check()


def test_a_chunk_is_cut_in_halves_and_joined_again():
    pool = BuddyPool(16)
    first, second = pool.allocate(3), pool.allocate(1)
    assert (first, second) == (range(0, 4), range(4, 5))
    assert pool.available(8) == 1 and pool.available(4) == 2 and pool.available(16) == 0
    pool.free(first)
    assert pool.available(8) == 1, "blocks 0 to 3 are free, but their buddy is not"
    pool.free(second)
    assert pool.available(16) == 1


def test_pieces_of_a_pool_that_is_no_power_of_two_are_never_joined_across_their_borders():
    pool = BuddyPool(7)
    chunks = [pool.allocate(1) for _ in range(7)]
    for chunk in chunks:
        pool.free(chunk)
    pool.check()
    assert [pool.capacity(n) for n in (1, 2, 4, 5)] == [pool.available(n) for n in (1, 2, 4, 5)] == [7, 3, 1, 0]


@pytest.mark.parametrize("chunk", [range(0, 2), range(1, 5), range(4, 8)])
def test_only_chunks_that_were_handed_out_can_be_freed(chunk):
    pool = BuddyPool(8)
    pool.allocate(4)
    with pytest.raises(BlockError, match="no chunk of this pool"):
        pool.free(chunk)
