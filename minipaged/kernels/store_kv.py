"""Writes this step's keys and values to their slots (PagedAttention paper §5.1, "fused reshape and block write").

k, v of this step                 slot_mapping              k_cache, v_cache
token 0  [KH, D] ───────────────▶ slot 37  ───────────────▶ block 2, offset 5   (block size 16)
token 1  [KH, D] ───────────────▶ slot 38  ───────────────▶ block 2, offset 6
token 2  [KH, D] ───────────────▶ slot 80  ───────────────▶ block 5, offset 0

One program instance: one token, up to HEADS of its heads, keys and values.

                   dim 0 … D-1, masked up to DIMS
          head 0  ┌────────────────────────┐
          head 1  │ a program loads this   │   rows of the cache that are neighbours, too:
          …       │ tile and stores it     │   reads and writes are both coalesced
          HEADS   └────────────────────────┘
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_kernel(
    k_ptr,  # [T, KH, D], as v
    v_ptr,
    k_cache_ptr,  # [N, S, KH, D], as v_cache
    v_cache_ptr,
    k_scale_ptr,  # [N, S, KH] float32, as v_scale; None if the caches are not quantized
    v_scale_ptr,
    slot_ptr,  # [T] int64
    k_token,  # strides, in elements; the last dimension of everything has stride 1
    k_head,
    v_token,
    v_head,
    cache_block,
    cache_token,
    cache_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    dim = tl.arange(0, DIMS)[None, :]  # [1, DIMS]
    live = (head < KV_HEADS) & (dim < HEAD_DIM)

    slot = tl.load(slot_ptr + token)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    there = block * cache_block + offset * cache_token + head * cache_head + dim  # int64, as slot is

    k = tl.load(k_ptr + token * k_token + head * k_head + dim, mask=live, other=0.0)
    v = tl.load(v_ptr + token * v_token + head * v_head + dim, mask=live, other=0.0)
    if k_scale_ptr is not None:
        one = slot * KV_HEADS + head  # [HEADS, 1]: a scale for each slot and head
        k, k_scale = quantize(k)
        v, v_scale = quantize(v)
        tl.store(k_scale_ptr + one, k_scale, mask=head < KV_HEADS)
        tl.store(v_scale_ptr + one, v_scale, mask=head < KV_HEADS)
    tl.store(k_cache_ptr + there, k, mask=live)
    tl.store(v_cache_ptr + there, v, mask=live)


@triton.jit
def quantize(x):
    """Rows of numbers → int8 and a scale for each row, such that number ≈ int8 · scale. [R, D] → [R, D], [R, 1]."""
    x = x.to(tl.float32)
    scale = tl.max(tl.abs(x), axis=1, keep_dims=True) / 127.0
    divisor = tl.where(scale == 0.0, 1.0, scale)
    # tl.div_rn: CUDA's plain division may be wrong in the last bit and give another int8 than `reference.quantize`.
    return tl.floor(tl.div_rn(x, divisor) + 0.5).to(tl.int8), scale


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """`reference.store_kv` in one launch.

    k, v: [T, KH, D]; they are copied first if the last dimension's stride is not 1. The caches' last dimension must
    have stride 1. Other strides are free, but equal in both caches.
    """
    T, KH, D = k.shape
    S = k_cache.shape[1]
    dims = triton.next_power_of_2(D)
    heads = min(triton.next_power_of_2(KH), max(1, 2048 // dims))
    k, v = dense_rows(k), dense_rows(v)
    _store_kernel[T, triton.cdiv(KH, heads)](
        k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        KV_HEADS=KH, HEAD_DIM=D, BLOCK_SIZE=S, HEADS=heads, DIMS=dims, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dimension: usually ``x`` itself, otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
