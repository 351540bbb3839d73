"""The prefill kernel: causal attention of many queries per sequence over its paged context (chunked prefill).

One launch processes several sequences, each with its own number of queries: the host divides their queries into tiles
and lists them, one row per tile. A program instance processes one tile and one key/value head. Its rows are
QUERIES neighbouring queries times the GROUP query heads that share the key/value head.

                       keys of the sequence, through its block table
                       0 ………………………… chunk starts ……………… context_len
    query 3 · head 0   ┌──────────────┬───────────┐
    query 3 · head 1   │              │■■┐        │        a program: one tile of rows; it walks over the
    query 4 · head 0   │ all visible  │■■■■┐      │        tiles of KEYS keys up to the last key that its last
    query 4 · head 1   │              │■■■■■■┐    │        query may see, and with a sliding window not from 0 but
    …                  └──────────────┴───────────┘        from the first key that its first query sees
                        tile → tile → tile →  end

Earlier context is read from the cache, and so are the chunk's own keys, which were stored before. So a first chunk, a
later chunk (Sarathi-Serve's chunked prefill), a chunk after a prefix cache hit and a decode are all the same case.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.tiles import EMPTY, LOG2_E, attend, offsets_of, tile_of


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["table_ptr"])
def _prefill_kernel(
    q_ptr,  # [T, H, D], as out
    k_ptr,  # [N, S, KH, D], as v
    v_ptr,
    k_scale_ptr,  # [N, S, KH] float32, as v_scale; None if the caches are not quantized
    v_scale_ptr,
    table_ptr,  # [B, M] int64
    tile_ptr,  # [tiles, 4] int64: sequence, first row of q, queries, position of the first
    out_ptr,
    scale,  # factor of the scores, log2 e included
    q_token,  # strides, in elements; the last dimension of everything has stride 1
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
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
):
    tile, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    seq = tl.load(tile_ptr + tile * 4)
    token = tl.load(tile_ptr + tile * 4 + 1)
    count = tl.load(tile_ptr + tile * 4 + 2).to(tl.int32)
    first = tl.load(tile_ptr + tile * 4 + 3).to(tl.int32)

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    query, query_head = row // GROUP, head * GROUP + row % GROUP  # [ROWS]
    live_dim = dim < HEAD_DIM
    live = (query < count)[:, None] & live_dim[None, :]
    q_row = (token + query)[:, None]  # int64, as token is
    q = tl.load(q_ptr + q_row * q_token + query_head[:, None] * q_head + dim[None, :], mask=live, other=0.0)

    peak = tl.full([ROWS], EMPTY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    here = (first + query)[:, None]  # [ROWS, 1], the queries' own positions
    begin, end = 0, first + count
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        alive = position < end
        at = offsets_of(position, alive, table_ptr + seq * table_stride, kv_block, kv_token, BLOCK_SIZE)
        at += head * kv_head
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=alive[None, :] & live_dim[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=alive[:, None] & live_dim[None, :], other=0.0)
        k_scale, v_scale = None, None
        if k_scale_ptr is not None:
            k_scale = tl.load(k_scale_ptr + at // HEAD_DIM, mask=alive, other=0.0)
            v_scale = tl.load(v_scale_ptr + at // HEAD_DIM, mask=alive, other=0.0)
        visible = position[None, :] <= here
        if WINDOWED:
            visible &= position[None, :] > here - window
        peak, total, acc = attend(q, k.to(q.dtype), v.to(q.dtype), k_scale, v_scale, visible, scale, peak, total, acc)

    # Every query sees itself; only padding rows may see no key, and they are not stored.
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    there = (q_row * KV_HEADS * GROUP + query_head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + there, out.to(out_ptr.dtype.element_ty), mask=live)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: list[int],
    query_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`reference.paged_prefill` in one launch.

    q: [sum(query_lens), H, D]; caches: [N, S, KH, D]; block_tables: [B, M]. Sequence b's queries are its last
    query_lens[b] of context_lens[b] tokens. Returns the shape of q. The last dimension of q and of the caches must have
    stride 1. Other strides are free, but equal in both caches.
    """
    T, H, D = q.shape
    S, KH = k_cache.shape[1:3]
    keys, dims = tile_of(D, q.itemsize)
    rows = max(rows_of(dims, q.itemsize, k_scale is not None), triton.next_power_of_2(H // KH))
    tiles = _tiles(tuple(context_lens), tuple(query_lens), rows // (H // KH), q.device)
    out = q.new_empty(T, H, D)
    _prefill_kernel[(len(tiles) * KH,)](
        q, k_cache, v_cache, k_scale, v_scale, block_tables, tiles, out, scale * LOG2_E,
        *q.stride()[:2], *k_cache.stride()[:3], block_tables.stride(0), sliding_window or 0,
        KV_HEADS=KH, GROUP=H // KH, HEAD_DIM=D, BLOCK_SIZE=S, WINDOWED=sliding_window is not None,
        ROWS=rows, KEYS=min(keys, 64), DIMS=dims, num_warps=8 if rows > 16 else 4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def rows_of(dims: int, itemsize: int, quantized: bool) -> int:
    """The number of rows in a tile of queries: as many as the registers of eight warps hold without spilling.

    Quantized keys and values pass through registers to the tensor cores, so they need more; for float32 see `tile_of`.
    """
    return min(64 if quantized else 128, max(16, 16384 // dims)) if itemsize == 2 else 16


@lru_cache(maxsize=8)  # all layers of a step have the same lengths: they share one copy to the GPU
def _tiles(context_lens: tuple[int, ...], query_lens: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """The list of tiles: [tiles, 4] int64: sequence, first row of q, number of queries, position of the first."""
    tiles, row = [], 0
    for b, (length, count) in enumerate(zip(context_lens, query_lens, strict=True)):
        for i in range(0, count, size):
            tiles.append((b, row + i, min(size, count - i), length - count + i))
        row += count
    tiles.sort(key=lambda tile: -tile[3])  # most keys first, so that no long tile runs alone at the end
    return torch.tensor(tiles, dtype=torch.int64).to(device, non_blocking=True)
