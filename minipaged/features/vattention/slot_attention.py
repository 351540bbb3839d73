"""Attention over slots of virtual memory, in which a sequence's keys and values are contiguous: no block tables.

The kernels of ``reference.py`` first gather keys and values; here they are already in place, so torch's own attention
does all the work, and a sliding window is a slice. Letters in shapes are those of ``reference.py``; W is the number of
tokens that fit into a slot.

One call per sequence, not one for a padded batch: padding would read memory where nothing is mapped, or what an earlier
owner left in it (0 · NaN is NaN). It would not be faster in general: on a CPU the padding costs what the calls save.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    slots: list[int],
    context_lens: list[int],
    query_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's last query_lens[b] tokens over the context_lens[b] tokens in slots[b].

    q: [sum(query_lens), H, D], sequences one after the other; k_slots, v_slots: [max_num_seqs, W, KH, D]. Returns the
    shape of q.
    """
    outs = []
    for queries, slot, length in zip(q.split(query_lens), slots, context_lens, strict=True):
        first = 0  # the first token that any of the queries attends to
        if sliding_window is not None:
            first = max(0, length - len(queries) + 1 - sliding_window)
        k, v = k_slots[slot, first:length], v_slots[slot, first:length]
        one = _decode if len(queries) == 1 else _prefill
        outs.append(one(queries, k, v, scale, sliding_window))
    return torch.cat(outs)


def _decode(q: Tensor, k: Tensor, v: Tensor, scale: float, _: int | None) -> Tensor:
    """q: [1, H, D] sees all of k, v: [L, KH, D]. The H/KH query heads of a key/value head are rows of one matrix."""
    _, H, D = q.shape
    KH = k.shape[1]
    k_, v_ = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, KH, L, D]
    out = F.scaled_dot_product_attention(q.view(1, KH, H // KH, D), k_, v_, scale=scale)
    return out.reshape(1, H, D)


def _prefill(q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int | None) -> Tensor:
    """q: [count, H, D] are the last tokens of k, v: [L, KH, D]."""
    count, length = len(q), len(k)
    visible = None  # a whole prompt needs no explicit mask
    if count < length or sliding_window is not None:
        position = torch.arange(length - count, length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)
        visible = key <= position  # [count, length]
        if sliding_window is not None:
            visible &= key > position - sliding_window
    q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or KH, count or L, D]
    out = F.scaled_dot_product_attention(
        q_, k_, v_, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)
