"""Block pool, prefix cache and block tables, one rule at a time. The fuzz test covers their combinations."""

import pytest

from minipaged.core.block_table import BlockTables
from minipaged.core.plan import Copy, Write
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import Hit
from minipaged.errors import BlockError, InvariantViolation, OutOfBlocks
from minipaged.features.swap.swap_tables import SwapTables


def filled(tables, seq_id, tokens):
    """Opens a block table, reserves and computes all tokens."""
    tables.open(seq_id, tables.match(tokens))
    tables.reserve(Write(seq_id, 0, len(tokens)))
    tables.mark_computed(seq_id, tokens, len(tokens))
    return tables.tables[seq_id]


# --- pool ---


def test_a_block_freed_twice_is_an_error_at_the_call():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.free(block)
    with pytest.raises(BlockError, match="freed twice"):
        pool.free(block)
    pool.check()


def test_freeing_an_unknown_block_is_an_error():
    for block in (-1, 2):
        with pytest.raises(BlockError, match="not one of this pool"):
            BlockPool(2).free(block)


def test_sharing_an_unknown_block_is_an_error():
    pool = BlockPool(1)
    pool.allocate()
    for block in (-1, 1):
        with pytest.raises(BlockError, match="not one of this pool"):
            pool.share(block)
    assert pool.ref_counts == [1]


def test_sharing_a_free_block_is_an_error():
    with pytest.raises(BlockError, match="nothing in it to share"):
        BlockPool(1).share(0)


def test_an_empty_pool_says_so():
    pool = BlockPool(1)
    pool.allocate()
    with pytest.raises(OutOfBlocks):
        pool.allocate()


def test_check_finds_a_block_that_is_free_and_referenced():
    pool = BlockPool(2)
    pool.ref_counts[0] = 1
    with pytest.raises(InvariantViolation):
        pool.check()


def test_check_finds_a_reference_that_no_table_holds():
    tables = BlockTables(2, 4)
    tables.pool.allocate()
    with pytest.raises(InvariantViolation, match="in 0 tables but has 1"):
        tables.check()


# --- growth ---


@pytest.mark.parametrize("block_size", [1, 3, 5, 16, 24])
def test_a_table_grows_only_when_its_last_block_is_full(block_size):
    tables = BlockTables(100, block_size)
    tables.open(0)
    for length in range(1, 60):
        tables.reserve(Write(0, length - 1, length))
        held = len(tables.tables[0]) * block_size
        assert length <= held < length + block_size  # waste stays below one block


def test_freeing_a_sequence_twice_is_an_error():
    tables = BlockTables(4, 4)
    filled(tables, 0, [1, 2, 3])
    tables.free(0)
    with pytest.raises(BlockError, match="no block table"):
        tables.free(0)


# --- fork and copy-on-write ---


def test_a_fork_shares_every_block_and_the_first_writer_copies_the_partial_one():
    tables = BlockTables(8, 4, enable_prefix_caching=False)
    parent = filled(tables, 0, [1, 2, 3, 4, 5, 6])
    tables.fork(0, 1)
    assert tables.tables[1] == parent and tables.pool.num_free == 6
    shared = parent[1]
    writes = [Write(0, 6, 7), Write(1, 6, 7)]
    assert tables.blocks_needed(writes) == 1  # not two: the last owner writes in place
    (copy,) = tables.reserve(writes[0])
    assert copy == Copy(shared, parent[1]) and parent[1] != shared
    assert tables.reserve(writes[1]) == [] and tables.tables[1][1] == shared
    assert tables.tables[0][0] == tables.tables[1][0]  # the full block stays shared
    tables.check()


def test_a_fork_on_a_block_boundary_copies_nothing():
    tables = BlockTables(8, 4, enable_prefix_caching=False)
    filled(tables, 0, [1, 2, 3, 4])
    tables.fork(0, 1)
    writes = [Write(0, 4, 5), Write(1, 4, 5)]
    assert tables.blocks_needed(writes) == 2
    assert tables.reserve(writes[0]) == tables.reserve(writes[1]) == []
    assert tables.tables[0][1] != tables.tables[1][1]


def test_blocks_needed_counts_one_copy_less_than_owners_when_all_write():
    tables = BlockTables(8, 4, enable_prefix_caching=False)
    filled(tables, 0, [1, 2])
    for child in (1, 2, 3):
        tables.fork(0, child)
    assert tables.blocks_needed([Write(s, 2, 3) for s in range(4)]) == 3
    assert tables.blocks_needed([Write(s, 2, 3) for s in range(3)]) == 3  # sequence 3 keeps the original block


# --- prefix cache ---


def test_full_blocks_of_a_finished_sequence_are_found_again():
    tables = BlockTables(8, 4)
    first = list(filled(tables, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    tables.free(0)
    assert tables.pool.num_free == 8
    second = filled(tables, 1, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert second[:2] == first[:2]


def test_a_fully_cached_prompt_leaves_one_token_to_compute():
    tables = BlockTables(8, 4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    filled(tables, 0, prompt)
    assert len(tables.match(prompt)) == 1  # 4 of 8 tokens: the last block must produce the logits
    assert len(tables.match([*prompt, 9])) == 2


def test_the_same_tokens_after_another_prefix_are_another_block():
    tables = BlockTables(8, 2)
    filled(tables, 0, [1, 1, 5, 5, 0])
    assert len(tables.match([1, 1, 5, 5, 0])) == 2
    assert tables.match([5, 5, 1, 1, 0]) == []
    filled(tables, 1, [2, 2, 5, 5, 0])
    assert tables.tables[0][1] != tables.tables[1][1]


def test_prefixes_whose_hashes_collide_are_told_apart():
    assert hash((-1, 3)) == hash((-2, 3))  # CPython gives -1 and -2 the same hash
    tables = BlockTables(8, 2)
    filled(tables, 0, [-1, 3, 9])
    assert tables.match([-2, 3, 9]) == []
    assert len(tables.match([-1, 3, 9])) == 1


def test_a_reserved_block_is_not_found_before_its_kv_exists():
    tables = BlockTables(8, 2)
    tables.open(0)
    tables.reserve(Write(0, 0, 4))
    assert tables.match([1, 2, 3, 4, 5]) == []
    tables.free(0)  # aborted before the step ran
    assert tables.match([1, 2, 3, 4, 5]) == []
    tables.check()


def test_an_evicted_block_leaves_the_index_and_its_twin_stays_valid():
    tables = BlockTables(3, 2)
    tables.open(0)
    tables.open(1)  # two identical prompts in one step: each computes its own copy
    for seq_id in (0, 1):
        tables.reserve(Write(seq_id, 0, 2))
    for seq_id in (0, 1):
        tables.mark_computed(seq_id, [1, 2], 2)
    tables.free(0)
    tables.reserve(Write(1, 2, 4))  # the third block is free
    tables.open(2)
    tables.reserve(Write(2, 0, 2))  # evicts sequence 0's cached block
    assert tables.match([1, 2, 3]) == []
    assert len(tables.tables[1]) == 2
    tables.check()


def test_tails_are_evicted_before_heads():
    class Oldest(list):
        """A policy that ignores the prefix tree, so that the order of freeing decides."""

        add = list.append

        def evict(self):
            return self.pop(0)

    for policy in (None, Oldest()):
        tables = BlockTables(3, 2, policy=policy)
        prompt = [1, 2, 3, 4, 5, 6]
        head, middle, tail = filled(tables, 0, prompt)
        tables.free(0)
        tables.open(1)
        tables.reserve(Write(1, 0, 4))
        assert tables.tables[1] == [tail, middle]
        assert tables.match([*prompt, 7]) == [Hit(1, head)]


def test_a_hit_on_a_block_without_owner_takes_it_from_the_free_count():
    tables = BlockTables(2, 2)
    filled(tables, 0, [1, 2])
    tables.free(0)
    assert tables.pool.num_free == 2
    tables.open(1, tables.match([1, 2, 3]))
    assert tables.pool.num_free == 1


def test_with_caching_off_nothing_is_found():
    tables = BlockTables(4, 2, enable_prefix_caching=False)
    filled(tables, 0, [1, 2, 3])
    assert tables.match([1, 2, 3]) == []


def test_an_eviction_policy_can_be_plugged_in():
    class MostRecent(list):
        add = list.append

        def evict(self):
            return self.pop()

    tables = BlockTables(2, 2, policy=MostRecent())
    filled(tables, 0, [1, 2])
    filled(tables, 1, [3, 4])
    tables.free(0)
    tables.free(1)
    tables.open(2)
    tables.reserve(Write(2, 0, 1))
    assert tables.match([1, 2, 0]) and not tables.match([3, 4, 0])


# --- swapping ---


def forked_pair(**settings):
    """Two sequences that share a full block and a partial one."""
    tables = BlockTables(8, 4, enable_prefix_caching=False, **settings)
    filled(tables, 0, [1, 2, 3, 4, 5, 6])
    tables.fork(0, 1)
    return tables


def swapping_pair():
    """The same two sequences, and a swap space of two blocks."""
    tables = forked_pair()
    return tables, SwapTables(tables, 2)


def test_a_shared_block_is_swapped_once_and_is_shared_there_too():
    tables, swap = swapping_pair()
    out = swap.swap_out([0, 1])
    assert len(out) == 2 and tables.pool.num_free == 8 and not tables.tables
    assert swap.tables[0] == swap.tables[1] == [copy.dst for copy in out]
    assert swap.pool.ref_counts == [2, 2]
    back = swap.swap_in([0, 1])
    assert [copy.src for copy in back] == [copy.dst for copy in out] and not swap.tables
    assert tables.tables[0] == tables.tables[1] == [copy.dst for copy in back]
    assert swap.pool.num_free == 2 and tables.pool.num_free == 6
    tables.check()
    swap.check()


def test_a_block_that_others_still_use_is_copied_out_and_only_loses_a_reference():
    tables, swap = swapping_pair()
    kept = list(tables.tables[1])
    swap.swap_out([0])
    assert tables.tables[1] == kept and [tables.pool.ref_counts[block] for block in kept] == [1, 1]
    swap.swap_in([0])
    assert not set(tables.tables[0]) & set(kept)  # it shares no block after the swap-in
    tables.check()
    swap.check()


def test_what_does_not_fit_into_the_swap_space_is_known_before():
    tables, swap = swapping_pair()
    assert swap.can_swap_out([0, 1])
    swap.swap_out([0])
    assert not swap.can_swap_out([1])


def test_swapping_in_counts_the_next_token_and_its_copies():
    tables, swap = swapping_pair()
    swap.swap_out([0, 1])
    assert swap.blocks_needed_to_swap_in([Write(0, 6, 7), Write(1, 6, 7)]) == 3  # its two blocks and one copy
    assert swap.blocks_needed_to_swap_in([Write(0, 6, 9), Write(1, 6, 9)]) == 5  # and two new blocks


def test_an_aborted_sequence_gives_back_its_swap_space():
    tables, swap = swapping_pair()
    swap.swap_out([0, 1])
    for seq_id in (0, 1):
        swap.free(seq_id)
    assert swap.pool.num_free == 2 and tables.pool.num_free == 8
    tables.check()
    swap.check()
