"""Decode and prefill kernels in Triton's interpreter, against the oracle in float64."""

import pytest
import torch

from minipaged.kernels import reference
from tests.kernels.interpreted.checks import TRITON, assert_close, check_decode, check_prefill, pages

F16, F32 = torch.float16, torch.float32
# Each value of each parameter occurs at least twice, in different combinations.
SHAPES = [
    # block size, head dim, heads, dtype
    (1, 8, (1, 1), F32),
    (1, 80, (6, 2), F16),
    (3, 33, (3, 1), F32),
    (3, 128, (16, 2), F16),
    (5, 64, (4, 2), F16),
    (5, 8, (8, 1), F32),
    (16, 64, (9, 3), F32),
    (16, 128, (2, 1), F32),
    (24, 80, (2, 2), F32),
    (24, 33, (4, 4), F16),
    (16, 256, (34, 2), F16),  # a group of more than 16 query heads
]
shapes = pytest.mark.parametrize("block_size, dim, heads, dtype", SHAPES)


@shapes
def test_decode(block_size, dim, heads, dtype):
    check_decode(TRITON, block_size, dim, heads, dtype)


@pytest.mark.parametrize("window", [1, 4, 36, 37, 1000])
def test_decode_with_a_sliding_window(window):
    check_decode(block_size=3, window=window)
    check_decode(block_size=16, dim=64, window=window, splits=2)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("splits", [2, 5])
def test_decode_in_splits_some_of_which_are_empty(splits, dtype):
    keys = {F32: 16, F16: 64}[dtype]
    # The last length needs two tiles per split.
    lengths = [1, keys - 1, keys, keys + 1, splits * keys - 3, splits * keys, splits * keys + 1]
    check_decode(dim=128, dtype=dtype, splits=splits, lengths=lengths)


def test_decode_of_a_context_of_no_tokens_gives_zeros():
    """Such rows pad a batch to the size of a CUDA graph."""
    k_cache, v_cache, tables = pages([4, 4], 4, 2, 8, F32)
    q = torch.randn(2, 4, 8)
    for splits in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TRITON.paged_decode, "splits_of", lambda *_, splits=splits: splits)
            out = TRITON.paged_decode.paged_decode(q, k_cache, v_cache, tables, torch.tensor([0, 4]), 0.3)
        assert (out[0] == 0).all()
        expected = reference.paged_decode(q, k_cache, v_cache, tables, torch.tensor([0, 4]), 0.3)
        assert_close(out, expected, F32)


@shapes
def test_prefill(block_size, dim, heads, dtype):
    check_prefill(TRITON, block_size, dim, heads, dtype)


@pytest.mark.parametrize("window", [1, 4, 40, 1000])
def test_prefill_with_a_sliding_window(window):
    check_prefill(block_size=3, window=window)
    check_prefill(block_size=16, dim=64, dtype=F16, window=window)


def test_rows_of_a_tile_that_see_nothing_of_its_first_keys():
    """The last queries' window begins after all keys of the first tile, so their softmax is empty after that tile."""
    check_prefill(heads=(1, 1), dtype=F16, window=2, chunks=[(130, 130)])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_int8_caches(dtype):
    check_decode(block_size=5, dim=33, dtype=dtype, int8=True)
    check_decode(block_size=16, dim=64, dtype=dtype, splits=2, window=30, int8=True)
    check_prefill(block_size=5, dim=33, dtype=dtype, int8=True)
    check_prefill(block_size=16, dim=64, dtype=dtype, window=9, int8=True)


def test_offsets_beyond_32_bits():
    """Blocks are 2^30 numbers apart, so the third one's offset exceeds 32 bits. Untouched pages take no memory."""
    stride = 2**30 + 64
    far = torch.empty(2, 3 * stride, dtype=F16).as_strided((2, 3, 4, 2, 8), (3 * stride, stride, 16, 8, 1))
    tables, slots = torch.tensor([[2, 1]]), torch.tensor([8, 9, 10, 11, 4, 5])
    near = torch.zeros(2, 3, 4, 2, 8, dtype=F16)
    k, v = torch.randn(2, 6, 2, 8, dtype=F16)
    TRITON.store_kv.store_kv(k, v, *far, slots)
    reference.store_kv(k, v, *near, slots)
    q = torch.randn(6, 4, 8, dtype=F16)
    decoded = TRITON.paged_decode.paged_decode(q[:1], *far, tables, torch.tensor([6]), 0.3)
    assert_close(decoded, reference.paged_decode(q[:1], *near, tables, torch.tensor([6]), 0.3), F16)
    prefilled = TRITON.paged_prefill.paged_prefill(q, *far, tables, [6], [6], 0.3)
    assert_close(prefilled, reference.paged_prefill(q, *near, tables, [6], [6], 0.3), F16)
    TRITON.copy_blocks.copy_blocks(list(far), torch.tensor([2]), torch.tensor([0]))
    assert torch.equal(far[:, 0], near[:, 2])
