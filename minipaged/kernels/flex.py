"""Paged attention with PyTorch's FlexAttention: the mask is written in torch, and torch generates the kernel.

Keys and values are not copied: each cache is treated as one long sequence of N · S tokens that all sequences
share. A block mask selects each sequence's blocks (its block table, unchanged), and `mask_mod` maps a slot of
the cache to its position in the sequence:

    table of a sequence   [7   2   5]                logical   block 2 → 1, block 5 → 2, block 7 → 0, others → -1
    slot 5 · S + 1        block 5, offset 1    ──▶   position  2 · S + 1

A masked slot counts as 0 times its value, so dead slots must not hold NaN: they do not, as caches start as zeros.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

QUERY_BLOCK = 128  # queries that share a row of the block mask


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
    """`reference.paged_decode` for caches that are not quantized. q: [B, H, D]. Returns [B, H, D]."""
    starts = context_lens - 1
    return _attend(q[:, None], k_cache, v_cache, block_tables, context_lens, starts, scale, sliding_window)[:, 0]


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
    """`reference.paged_prefill` for caches that are not quantized. q: [sum(query_lens), H, D]. Returns its shape."""
    padded = torch.nn.utils.rnn.pad_sequence(q.split(query_lens), batch_first=True)  # [B, longest, H, D]
    lens, counts = (torch.tensor(values, device=q.device) for values in (context_lens, query_lens))
    out = _attend(padded, k_cache, v_cache, block_tables, lens, lens - counts, scale, sliding_window)
    return torch.cat([rows[:count] for rows, count in zip(out, query_lens, strict=True)])


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lens: Tensor, starts: Tensor, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """q: [B, Q, H, D]: sequence b's queries start at position starts[b] of lens[b] tokens. Returns the same shape."""
    S = k_cache.shape[1]
    k, v = (cache.flatten(0, 1).transpose(0, 1)[None] for cache in (k_cache, v_cache))  # [1, KH, N · S, D], views
    mask = _block_mask(tables, lens, starts, k_cache.shape[0], S, q.shape[1], window)
    options = {"BLOCK_N": gcd(S, 64)}  # a tile of keys must not cross a block's end: the next block is elsewhere
    out = _kernel(q.is_cuda)(
        q.transpose(1, 2), k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options
    )
    return out.transpose(1, 2)


def _block_mask(
    tables: Tensor, lens: Tensor, starts: Tensor, num_blocks: int, S: int, num_queries: int, window: int | None
) -> BlockMask:
    (B, M), device = tables.shape, tables.device
    used = (lens + S - 1) // S  # [B] blocks
    column = torch.arange(M, device=device).expand(B, M)
    owned = torch.where(column < used[:, None], tables, num_blocks)  # padding goes to an extra column
    logical = torch.full((B, num_blocks + 1), -1, device=device).scatter_(1, owned, column)

    def visible(b: Tensor, h: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        place, here = logical[b, slot // S], starts[b] + query
        position = place * S + slot % S
        seen = (place >= 0) & (position <= here)
        return seen if window is None else seen & (position > here - window)

    rows = -(-num_queries // QUERY_BLOCK)
    blocks = torch.zeros(B, num_blocks, dtype=torch.int32, device=device)
    blocks[:, :M] = tables[:, :num_blocks]
    return BlockMask.from_kv_blocks(
        used.to(torch.int32)[:, None, None].expand(B, 1, rows),
        blocks[:, None, None].expand(B, 1, rows, num_blocks),
        BLOCK_SIZE=(QUERY_BLOCK, S),
        mask_mod=visible,
        seq_lengths=(num_queries, num_blocks * S),
        compute_q_blocks=False,  # needed only for gradients
    )


@lru_cache
def _kernel(compiled: bool) -> Any:
    # Without compilation it computes every query's scores with the whole pool: for tests.
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
