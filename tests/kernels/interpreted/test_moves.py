"""The kernels that move keys and values (store, copy, swap), and the fused kernels."""

import pytest
import torch

from minipaged.kernels import reference
from tests.kernels.interpreted.checks import CANARY, TRITON, assert_close, check_copies, check_store, fenced

F16, F32 = torch.float16, torch.float32


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, torch.bfloat16])
@pytest.mark.parametrize("block_size, kv_heads, dim", [(1, 1, 8), (3, 3, 33), (5, 2, 64), (16, 9, 80), (24, 20, 256)])
def test_store(block_size, kv_heads, dim, dtype, int8):
    check_store(TRITON, block_size, kv_heads, dim, dtype, int8)


@pytest.mark.parametrize(
    "shape, dtype",
    [((1, 1, 33), torch.int8), ((5, 3, 33), F16), ((3, 1, 33), F32), ((24, 4, 80), torch.bfloat16), ((16, 2), F32)],
)
def test_copies(shape, dtype):
    check_copies(TRITON, shape, dtype)


def test_copies_read_before_any_write():
    cache = torch.arange(4.0)[:, None, None, None].clone()
    TRITON.copy_blocks.copy_blocks([cache], torch.tensor([0, 1]), torch.tensor([1, 2]))  # 1 is a source and a target
    assert cache.flatten().tolist() == [0, 0, 1, 3]


def test_swaps_move_blocks_between_pools_of_different_sizes():
    pool, space = [torch.randn(6, 5, 2, 8) for _ in range(3)], [torch.zeros(4, 5, 2, 8) for _ in range(3)]
    before = [x.clone() for x in pool]
    out = torch.tensor([5, 1]), torch.tensor([0, 3])
    expected = [x.clone() for x in space]
    reference.swap_blocks(pool, expected, *out)
    with fenced() as fences:
        fenced_space = [fences.around(x) for x in space]
        TRITON.swap.swap_blocks(pool, fenced_space, *out)
    assert all(map(torch.equal, fenced_space, expected))
    TRITON.swap.swap_blocks(fenced_space, pool, out[1], torch.tensor([2, 0]))
    for now, then in zip(pool, before, strict=True):
        assert torch.equal(now[[2, 0]], then[[5, 1]]) and torch.equal(now[[1, 3, 4, 5]], then[[1, 3, 4, 5]])


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("size", [8, 33, 576])
def test_add_norm(size, dtype):
    torch.manual_seed(0)
    x, delta = torch.randn(3, 2 * size, dtype=dtype).chunk(2, dim=1)
    weight = torch.randn(size, dtype=dtype)
    total, normed = TRITON.fused.add_norm(x, delta, weight, 1e-5)
    expected_total, expected = reference.add_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected, dtype)


def test_add_norm_of_large_numbers_does_not_overflow():
    x = torch.full((1, 64), 3e4, dtype=F16)
    _, normed = TRITON.fused.add_norm(x, -x / 2, torch.ones(64, dtype=F16), 1e-5)
    assert_close(normed, torch.ones(1, 64), F16)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "heads, dim, dtype", [((4, 2), 8, F32), ((9, 3), 64, F16), ((3, 1), 34, F32), ((2, 2), 80, F16)]
)
def test_rope_store(heads, dim, dtype, int8):
    torch.manual_seed(0)
    (H, KH), T, S = heads, 5, 3
    q, k, v = torch.randn(T, H + 2 * KH, dim, dtype=dtype).split([H, KH, KH], dim=1)
    angles = torch.randn(T, 1, dim // 2)
    cos, sin = (torch.cat((x, x), -1).to(dtype) for x in (angles.cos(), angles.sin()))
    slots = torch.tensor([3, 4, 5, 11, 0])
    caches = [torch.full((4, S, KH, dim), CANARY, dtype=torch.int8 if int8 else dtype) for _ in range(2)]
    scales = [torch.full((4, S, KH), float(CANARY)) for _ in range(2)] if int8 else []
    expected = [x.clone() for x in caches + scales]
    out = reference.rope_store(q, k, v, cos, sin, *expected[:2], slots, *expected[2:])
    with fenced() as fences:
        found = [fences.around(x) for x in caches + scales]
        assert_close(TRITON.fused.rope_store(q, k, v, cos, sin, *found[:2], slots, *found[2:]), out, dtype)
    # A difference of one in int8 is allowed, because the oracle rounds to 16 bits in between.
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1 if ours.dtype is torch.int8 else 2e-3)
