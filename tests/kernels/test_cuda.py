"""The checks of the interpreted kernels, compiled and on a GPU, also with bfloat16, which the interpreter lacks.

The oracle computes in float64 on the GPU. The traps are the same: NaN in memory that must not be read, and canaries
around written tensors.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
pytest.importorskip("triton", reason="there is no Triton here, so there are no kernels to test")

from minipaged.kernels.tiles import tile_of  # noqa: E402 (imports triton)
from tests.kernels.interpreted import checks  # noqa: E402

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
WINDOWS = (1, 4, 37, 1000)
# Block size, head dimension, heads, dtype: every dtype with unusual and usual sizes.
SHAPES = [
    (1, 8, (1, 1), F32),
    (1, 80, (6, 2), F16),
    (3, 33, (3, 1), F32),
    (3, 128, (16, 2), BF16),
    (5, 64, (4, 2), F16),
    (5, 8, (8, 1), BF16),
    (16, 64, (9, 3), F32),
    (16, 128, (32, 8), BF16),
    (16, 128, (32, 8), F16),
    (24, 80, (2, 2), F32),
    (24, 33, (4, 4), BF16),
    (16, 256, (34, 2), F16),
    (16, 256, (4, 2), F32),
]
shapes = pytest.mark.parametrize("block_size, dim, heads, dtype", SHAPES)


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Creates the checks' tensors on the GPU, and synchronizes, so that a kernel's error appears in its own test."""
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


@shapes
def test_decode(block_size, dim, heads, dtype):
    checks.check_decode(checks.TRITON, block_size, dim, heads, dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("splits", [2, 5])
def test_decode_in_splits_some_of_which_are_empty(splits, dtype):
    keys = tile_of(128, dtype.itemsize)[0]
    lengths = [1, keys - 1, keys, keys + 1, splits * keys - 3]
    checks.check_decode(dim=128, dtype=dtype, splits=splits, lengths=lengths)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_decode_splits_a_long_context_by_itself(dtype):
    kernels, lengths = checks.TRITON.paged_decode, [3, 1500]
    k_cache, v_cache, tables = checks.pages(lengths, 16, 2, 64, dtype)
    q, lens = torch.randn(2, 4, 64).to(dtype), torch.tensor(lengths)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert kernels.splits_of(1504, tile_of(64, dtype.itemsize)[0], 4, processors) > 1
    out = kernels.paged_decode(q, k_cache, v_cache, tables, lens, 0.125)
    wide = (x.double() for x in (q, k_cache, v_cache))
    checks.assert_close(out, checks.reference.paged_decode(*wide, tables, lens, 0.125), dtype)


@shapes
def test_prefill(block_size, dim, heads, dtype):
    checks.check_prefill(checks.TRITON, block_size, dim, heads, dtype)


@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_windows(window):
    checks.check_decode(block_size=3, window=window)
    checks.check_decode(block_size=16, dim=64, dtype=BF16, window=window, splits=2)
    checks.check_prefill(block_size=3, window=window)
    checks.check_prefill(block_size=16, dim=64, dtype=BF16, window=window)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_int8_caches(dtype):
    checks.check_decode(block_size=16, dim=64, dtype=dtype, int8=True)
    checks.check_prefill(block_size=5, dim=33, dtype=dtype, int8=True)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("block_size, kv_heads, dim", [(1, 1, 8), (3, 3, 33), (16, 8, 128), (24, 20, 256)])
def test_store(block_size, kv_heads, dim, dtype, int8):
    checks.check_store(checks.TRITON, block_size, kv_heads, dim, dtype, int8)


@pytest.mark.parametrize("shape, dtype", [((5, 3, 33), F16), ((16, 8, 128), BF16), ((1, 1, 33), torch.int8)])
def test_copies(shape, dtype):
    checks.check_copies(checks.TRITON, shape, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_blocks_go_to_pinned_memory_and_back(dtype):
    pool = [torch.randn(6, 5, 2, 8).to(dtype) for _ in range(4)]
    before = [x.clone() for x in pool]
    space = [torch.zeros(4, 5, 2, 8, dtype=dtype, device="cpu", pin_memory=True) for _ in range(4)]
    out, home = torch.tensor([5, 1], device="cpu"), torch.tensor([0, 3], device="cpu")
    checks.TRITON.swap.swap_blocks(pool, space, out, home)
    for x in pool:
        x.fill_(torch.nan)  # queued after the copy, which must read its blocks before
    checks.TRITON.swap.swap_blocks(space, pool, home, out)
    torch.cuda.synchronize()
    for now, then, swapped in zip(pool, before, space, strict=True):
        assert torch.equal(now[[5, 1]], then[[5, 1]]) and now[[0, 2, 3, 4]].isnan().all()
        assert torch.equal(swapped[[0, 3]], then[[5, 1]].cpu()) and not swapped[[1, 2]].any()


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_add_norm(dtype):
    x, delta = torch.randn(3, 2 * 576).to(dtype).chunk(2, dim=1)
    weight = torch.randn(576).to(dtype)
    found = checks.TRITON.fused.add_norm(x, delta, weight, 1e-5)
    expected = checks.reference.add_norm(x.double(), delta.double(), weight.double(), 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        checks.assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rope_store(dtype):
    q, k, v = torch.randn(5, 8, 64).to(dtype).split([4, 2, 2], dim=1)
    angles, slots = torch.randn(5, 1, 32).repeat(1, 1, 2), torch.tensor([3, 4, 5, 11, 0])
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    caches, exact = torch.zeros(2, 4, 3, 2, 64, dtype=dtype), torch.zeros(2, 4, 3, 2, 64, dtype=torch.float64)
    out = checks.TRITON.fused.rope_store(q, k, v, cos, sin, *caches, slots)
    expected = checks.reference.rope_store(*(x.double() for x in (q, k, v, cos, sin)), *exact, slots)
    checks.assert_close(out, expected, dtype)
    checks.assert_close(caches, exact, dtype)
