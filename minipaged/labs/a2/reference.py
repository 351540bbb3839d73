"""Lab A2: attention over keys and values that lie in blocks.

You write the functions that raise NotImplementedError. README.md, beside this file, says what they must do.

Letters used in shapes:

    B  sequences                         M   blocks in the longest block table
    H  query heads                       KH  key/value heads (KH divides H)
    D  head dimension                    N   physical blocks         S  block size
"""

from __future__ import annotations

import torch
from torch import Tensor


# lab: A2.1
def slot_mapping(block_table: list[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """The slots of a sequence's tokens at positions start … start + num_tokens − 1, one after the other.

    Slot = block · block_size + offset in the block: its number if all slots of the cache are counted through.
    """
    positions = range(start, start + num_tokens)
    return [block_table[p // block_size] * block_size + p % block_size for p in positions]


# lab: A2.2, A2.3, A2.4
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Attention of one query per sequence over its context, which lies in blocks.

    q: [B, H, D]; k_cache, v_cache: [N, S, KH, D]; block_tables: [B, M] int64, short ones padded with any block's
    number; context_lens: [B] int64, how many tokens each sequence has, at least 1. Returns [B, H, D].
    """
    B, H, D = q.shape
    S, KH = k_cache.shape[1:3]
    length = block_tables.shape[1] * S
    alive = torch.arange(length) < context_lens[:, None]  # [B, M · S]
    dead = ~alive[:, :, None, None]
    k = k_cache[block_tables].view(B, length, KH, D)
    v = v_cache[block_tables].view(B, length, KH, D)
    v = v.masked_fill(dead, 0)  # weight 0 is not enough: 0 · NaN is NaN

    # The H/KH query heads that share a key/value head are neighbours.
    grouped = q.view(B, KH, H // KH, D)
    scores = torch.einsum("bkgd,blkd->bkgl", grouped, k) * scale
    scores = scores.masked_fill(~alive[:, None, None], -torch.inf)
    out = torch.einsum("bkgl,blkd->bkgd", scores.softmax(-1), v)
    return out.reshape(B, H, D)
