"""Fused Triton kernels for memory-bound operations: each combines two operations in one launch.

`add_norm`: the residual sum and the norm that reads it. Unfused, the sum is written once and read twice.

    x      ─┐                                   a program: one row of C numbers, which it holds
    delta  ─┴─▶ + ─┬─▶ sum, stored               while it adds, squares, sums and scales
                   └─▶ RMS ─▶ · weight, stored

`rope_store`: rotary positions, and the store into the KV cache. Unfused, rotated keys are written to memory, then read
and written again into their slots.

    q [H, D]   ─▶ turn ─▶ q, stored              a program: HEADS heads of one token; the first programs process the
    k [KH, D]  ─▶ turn ─▶ its slot in k_cache    query heads, the others the key/value heads
    v [KH, D]  ─────────▶ its slot in v_cache

The reference versions in plain torch are `reference.add_norm` and `reference.rope_store`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.store_kv import dense_rows, quantize


@triton.jit
def _add_norm_kernel(
    x_ptr,  # [T, C], as delta, sum and norm; all contiguous
    delta_ptr,
    weight_ptr,  # [C]
    sum_ptr,
    norm_ptr,
    eps,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row, channel = tl.program_id(0).to(tl.int64) * SIZE, tl.arange(0, CHANNELS)
    live = channel < SIZE
    total = tl.load(x_ptr + row + channel, mask=live, other=0.0)
    total += tl.load(delta_ptr + row + channel, mask=live, other=0.0)
    tl.store(sum_ptr + row + channel, total, mask=live)
    wide = total.to(tl.float32)  # after rounding: the next layer reads the same numbers
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)).to(total.dtype)
    weight = tl.load(weight_ptr + channel, mask=live, other=0.0)
    tl.store(norm_ptr + row + channel, weight * normed, mask=live)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_norm` in one launch. x, delta: [T, C]; weight: [C]."""
    T, C = x.shape
    x, delta = x.contiguous(), delta.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    channels = triton.next_power_of_2(C)
    _add_norm_kernel[(T,)](
        x, delta, weight, total, normed, eps, SIZE=C, CHANNELS=channels,
        num_warps=min(16, max(1, channels // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    return total, normed


@triton.jit
def _rope_store_kernel(
    q_ptr,  # [T, H, D], as out
    k_ptr,  # [T, KH, D], as v
    v_ptr,
    cos_ptr,  # [T, 1, D], as sin
    sin_ptr,
    out_ptr,
    k_cache_ptr,  # [N, S, KH, D], as v_cache
    v_cache_ptr,
    k_scale_ptr,  # [N, S, KH] float32, as v_scale; None if the caches are not quantized
    v_scale_ptr,
    slot_ptr,  # [T] int64
    q_token,  # strides, in elements; the last dimension of everything has stride 1
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    cache_block,
    cache_token,
    cache_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    programs_of_q = (Q_HEADS + HEADS - 1) // HEADS
    dim = tl.arange(0, DIMS)[None, :]
    in_row = dim < HEAD_DIM
    cos = tl.load(cos_ptr + token * HEAD_DIM + dim, mask=in_row, other=0.0)
    sin = tl.load(sin_ptr + token * HEAD_DIM + dim, mask=in_row, other=0.0)
    if tl.program_id(1) < programs_of_q:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        live = (head < Q_HEADS) & in_row
        q = turn(q_ptr + token * q_token + head * q_head, dim, cos, sin, live, HEAD_DIM)
        tl.store(out_ptr + (token * Q_HEADS + head) * HEAD_DIM + dim, q, mask=live)
    else:
        head = (tl.program_id(1) - programs_of_q) * HEADS + tl.arange(0, HEADS)[:, None]
        live = (head < KV_HEADS) & in_row
        k = turn(k_ptr + token * k_token + head * k_head, dim, cos, sin, live, HEAD_DIM)
        v = tl.load(v_ptr + token * v_token + head * v_head + dim, mask=live, other=0.0)
        slot = tl.load(slot_ptr + token)
        if k_scale_ptr is not None:
            one = slot * KV_HEADS + head
            k, k_scale = quantize(k)
            v, v_scale = quantize(v)
            tl.store(k_scale_ptr + one, k_scale, mask=head < KV_HEADS)
            tl.store(v_scale_ptr + one, v_scale, mask=head < KV_HEADS)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        there = block * cache_block + offset * cache_token + head * cache_head + dim
        tl.store(k_cache_ptr + there, k, mask=live)
        tl.store(v_cache_ptr + there, v, mask=live)


@triton.jit
def turn(row_ptr, dim, cos, sin, live, HEAD_DIM: tl.constexpr):
    """Loads a tile of heads and rotates channels i and i + D/2 as a pair, as `reference.rotate` does."""
    x = tl.load(row_ptr + dim, mask=live, other=0.0)
    first = dim < HEAD_DIM // 2
    partner = tl.load(row_ptr + tl.where(first, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2), mask=live, other=0.0)
    turned = x.to(tl.float32) * cos + tl.where(first, -partner, partner).to(tl.float32) * sin
    return turned.to(x.dtype)


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`reference.rope_store` in one launch. q: [T, H, D]; k, v: [T, KH, D]; cos, sin: [T, 1, D], contiguous."""
    T, H, D = q.shape
    S, KH = k_cache.shape[1:3]
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = q.new_empty(T, H, D)
    dims = triton.next_power_of_2(D)
    heads = min(triton.next_power_of_2(KH), max(1, 2048 // dims))
    _rope_store_kernel[T, triton.cdiv(H, heads) + triton.cdiv(KH, heads)](
        q, k, v, cos, sin, out, k_cache, v_cache, k_scale, v_scale, slot_mapping,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        Q_HEADS=H, KV_HEADS=KH, HEAD_DIM=D, BLOCK_SIZE=S, HEADS=heads, DIMS=dims, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
