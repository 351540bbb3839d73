"""The decode kernel: attention of one query per sequence over its paged context (PagedAttention paper §4.1).

Decoding reads every key and value once and computes little with each: it is memory-bound. A program instance
processes one sequence, one key/value head and one *split* of the context (flash-decoding): the H/KH query heads that
share the key/value head are the rows of one small matrix, so that keys and values are read once for all of them, and
tensor cores compute the products. Tensor cores need at least 16 rows; the missing ones are padding.

                      context of the sequence, through its block table
                      ┌─ split 0 ──────┬─ split 1 ──────┬─ split 2 ───┐
    GROUP query   h0  │ tile → tile →  │ tile → tile →  │ tile → end  │     a program: one split, one kv head;
    heads of one  h1  │                │                │             │     it walks in tiles of KEYS tokens,
    kv head       h2  │                │                │             │     keeping peak, total and acc (tiles.py)
    padding       ··  │                │                │             │
                      └───────┬────────┴───────┬────────┴──────┬──────┘
                        acc, lse         acc, lse         acc, lse
                              └────────────────┼───────────────┘
                                     merge kernel: one program per query head

Without splits, a single long sequence would leave most of a GPU idle. With many sequences there is one split, and the
result is written directly. The host fixes the number of splits; the kernel computes their length from each sequence's
length, so that the host need not know it. So a CUDA graph recorded for the longest context serves short ones, too:
splits without any tokens end at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.tiles import EMPTY, LOG2_E, attend, offsets_of, tile_of

MAX_SPLITS = 128
LEAST_TILES = 4  # per split, because each split's result must be written and read again
EVERYTHING = 2**31 - 1  # a sliding window that is longer than any context


# Arguments that change from step to step are not specialized: a 1, a multiple of 16 or an alignment would recompile.
@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["table_ptr", "len_ptr"],  # views of a step's tensors, with any alignment
)
def _decode_kernel(
    q_ptr,  # [B, H, D]
    k_ptr,  # [N, S, KH, D], as v
    v_ptr,
    k_scale_ptr,  # [N, S, KH] float32, as v_scale; None if the caches are not quantized
    v_scale_ptr,
    table_ptr,  # [B, M] int64
    len_ptr,  # [B] int64
    out_ptr,  # [B, H, splits, D]: the result, or each split's result in float32
    lse_ptr,  # [B, H, splits] float32: log2 of the splits' sums of exponentials; None if there is one split
    scale,  # factor of the scores, log2 e included
    q_seq,  # strides, in elements; the last dimension of everything has stride 1
    q_head,
    kv_block,
    kv_token,
    kv_head,
    table_stride,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
):
    # Neighbouring programs process neighbouring heads, which are adjacent in memory.
    seq = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    split, splits = tl.program_id(1), tl.num_programs(1)

    length = tl.load(len_ptr + seq).to(tl.int32)
    oldest = tl.maximum(length - window, 0)
    split_len = tl.maximum(tl.cdiv(tl.cdiv(length - oldest, splits), KEYS), LEAST_TILES) * KEYS
    begin = oldest + split * split_len
    end = tl.minimum(begin + split_len, length)

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    live_row, live_dim = row < GROUP, dim < HEAD_DIM
    live = live_row[:, None] & live_dim[None, :]
    query_head = head * GROUP + row  # [ROWS]
    q = tl.load(q_ptr + seq * q_seq + query_head[:, None] * q_head + dim[None, :], mask=live, other=0.0)

    peak = tl.full([ROWS], EMPTY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        alive = position < end
        # Dead slots are never loaded: what they hold, even NaN, cannot affect the result.
        at = offsets_of(position, alive, table_ptr + seq * table_stride, kv_block, kv_token, BLOCK_SIZE)
        at += head * kv_head
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=alive[None, :] & live_dim[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=alive[:, None] & live_dim[None, :], other=0.0)
        k_scale, v_scale = None, None
        if k_scale_ptr is not None:
            # Offsets in [N, S, KH, D], divided by D, are offsets in [N, S, KH].
            k_scale = tl.load(k_scale_ptr + at // HEAD_DIM, mask=alive, other=0.0)
            v_scale = tl.load(v_scale_ptr + at // HEAD_DIM, mask=alive, other=0.0)
        peak, total, acc = attend(
            q, k.to(q.dtype), v.to(q.dtype), k_scale, v_scale, alive[None, :], scale, peak, total, acc
        )

    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # an empty context gives zeros
    part = (seq * KV_HEADS * GROUP + query_head) * splits + split  # [ROWS]
    tl.store(out_ptr + part[:, None] * HEAD_DIM + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=live)
    if lse_ptr is not None:
        tl.store(lse_ptr + part, peak + tl.log2(total), mask=live_row)  # an empty split: -inf


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    part_ptr,  # [B · H, splits, D] float32
    lse_ptr,  # [B · H, splits] float32
    out_ptr,  # [B · H, D]
    splits,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Merges the splits of one query head: the mean of their results, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, DIMS)
    lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    peak = tl.maximum(tl.max(lse, axis=0), EMPTY)
    total = tl.sum(tl.exp2(lse - peak), axis=0)
    acc = tl.zeros([DIMS], tl.float32)
    for i in range(splits):
        weight = tl.exp2(tl.load(lse_ptr + row * splits + i) - peak)
        acc += weight * tl.load(part_ptr + (row * splits + i) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`reference.paged_decode` in one launch, or two for few sequences with long contexts. Never waits for the GPU.

    q: [B, H, D]; caches: [N, S, KH, D]; block_tables: [B, M]; context_lens: [B]. Returns [B, H, D].
    The last dimension of q and of the caches must have stride 1. Other strides may be any, but the same in both caches;
    with int8 caches they must be D times those of the scales.
    """
    B, H, D = q.shape
    S, KH = k_cache.shape[1:3]
    keys, dims = tile_of(D, q.itemsize)
    longest = block_tables.shape[1] * S  # an upper bound that does not need context_lens from the GPU
    splits = splits_of(min(longest, sliding_window or longest), keys, B * KH, _num_processors(q.device))
    out = q.new_empty(B, H, D)
    parts, lse = out, None
    if splits > 1:
        parts, lse = q.new_empty(B, H, splits, D, dtype=torch.float32), q.new_empty(B, H, splits, dtype=torch.float32)
    _decode_kernel[B * KH, splits](
        q, k_cache, v_cache, k_scale, v_scale, block_tables, context_lens, parts, lse, scale * LOG2_E,
        *q.stride()[:2], *k_cache.stride()[:3], block_tables.stride(0), sliding_window or EVERYTHING,
        KV_HEADS=KH, GROUP=H // KH, HEAD_DIM=D, BLOCK_SIZE=S,
        ROWS=max(16, triton.next_power_of_2(H // KH)), KEYS=keys, DIMS=dims, LEAST_TILES=LEAST_TILES,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    if lse is not None:
        _merge_kernel[(B * H,)](
            parts, lse, out, splits, HEAD_DIM=D, DIMS=dims, MAX_SPLITS=MAX_SPLITS, num_warps=2, enable_fp_fusion=True
        )
    return out


def splits_of(longest: int, keys: int, programs: int, processors: int) -> int:
    """The number of splits for contexts of at most ``longest`` tokens. ``programs``: program instances per split.

    Enough to give each multiprocessor four programs to switch between, if there are enough tiles for that.
    """
    return max(1, min(4 * processors // programs, longest // (LEAST_TILES * keys), MAX_SPLITS))


@lru_cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
