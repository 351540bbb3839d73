"""Paged attention in plain torch: what every faster kernel must equal.

Letters used in shapes:

    T  tokens computed in this step, all sequences one after the other
    B  sequences in this step            M   blocks in the longest block table
    H  query heads                       KH  key/value heads (KH divides H: grouped-query attention)
    D  head dimension                    N   physical blocks         S  block size

Dead slots (the unfilled tail of a last block, and the padding of short block tables) may hold anything, NaN too, left
there by an earlier owner. No function here lets them reach a result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Scatters this step's keys and values into their slots (paper §4.3, "fused reshape and block write").

    k, v: [T, KH, D]; caches: [N, S, KH, D], changed in place; slot_mapping: [T], slot = block · S + offset.
    """
    k_cache.flatten(0, 1)[slot_mapping] = k
    v_cache.flatten(0, 1)[slot_mapping] = v


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of one query per sequence over its blocks, the whole batch at once (paper §4.1, equation 4).

    Blocks are gathered into a padded [B, M · S] context and masked by length: the gather is the price of paging in
    plain torch, which a kernel that follows the block table itself does not pay.

    q: [B, H, D]; caches: [N, S, KH, D]; block_tables: [B, M]; context_lens: [B], the query's own token included.
    Returns [B, H, D].
    """
    B, H, D = q.shape
    KH = k_cache.shape[2]
    length = block_tables.shape[1] * k_cache.shape[1]
    slot = torch.arange(length, device=q.device)
    alive = slot < context_lens[:, None]  # [B, M · S]
    visible = alive if sliding_window is None else alive & (slot >= context_lens[:, None] - sliding_window)

    def gather(cache: Tensor) -> Tensor:
        context = cache[block_tables].view(B, length, KH, D)
        # 0 · NaN is NaN: masking the scores alone would let a dead value through the weighted sum.
        return context.masked_fill_(~alive[:, :, None, None], 0).transpose(1, 2)  # [B, KH, M · S, D]

    # The H/KH query heads that share a key/value head become rows of one small matrix: no key is ever repeated.
    out = F.scaled_dot_product_attention(
        q.view(B, KH, H // KH, D), gather(k_cache), gather(v_cache), attn_mask=visible[:, None, None], scale=scale
    )
    return out.reshape(B, H, D)


def attention_weights(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    context_len: int,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """What one query makes of its context: the softmax inside `paged_decode`, one row per query head.

    q: [H, D]; k_cache: [N, S, KH, D]; block_table: [M], at least as many blocks as the context fills.
    Returns [H, context_len] in float32; each row sums to 1.
    """
    S, KH = k_cache.shape[1:3]
    blocks = block_table[: -(-context_len // S)]
    k = k_cache[blocks].flatten(0, 1)[:context_len].float()  # [context_len, KH, D]
    k = k.repeat_interleave(q.shape[0] // KH, dim=1)  # a key head serves H / KH query heads
    scores = scale * torch.einsum("hd,lhd->hl", q.float(), k)
    if sliding_window is not None:
        scores[:, : max(0, context_len - sliding_window)] = -torch.inf
    return scores.softmax(dim=-1)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: list[int],
    query_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of several queries per sequence: prompts, and chunks of prompts with earlier context.

    q: [sum(query_lens), H, D], sequences one after the other; caches: [N, S, KH, D]; block_tables: [B, M].
    Sequence b's queries are its last query_lens[b] of context_lens[b] tokens. Returns the shape of q.
    """
    S = k_cache.shape[1]
    outs = []
    for b, queries in enumerate(q.split(query_lens)):
        length, count = context_lens[b], query_lens[b]
        blocks = block_tables[b, : -(-length // S)]
        k = k_cache[blocks].flatten(0, 1)[:length]  # [length, KH, D]
        v = v_cache[blocks].flatten(0, 1)[:length]
        position = torch.arange(length - count, length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)
        visible = key <= position  # [count, length]
        if sliding_window is not None:
            visible &= key > position - sliding_window
        q_, k_, v_ = queries.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=visible, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))  # [1, H, count, D] → [count, H, D]
    return torch.cat(outs)


def copy_blocks(caches: list[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copies whole blocks src[i] → dst[i] in every cache (copy-on-write, paper §4.4).

    All reads happen before any write, so a block that is freed and handed out again as a target within the same step
    still serves as a source. caches: each [N, S, KH, D]; src, dst: [number of copies].
    """
    for cache in caches:
        cache[dst] = cache[src]
