"""Paged attention and a model's small operations in plain torch: the reference that every faster kernel must match.

Letters used in shapes (C, F: see models/layers.py):

    T  tokens computed in this step, all sequences concatenated
    B  sequences in this step            M   blocks in the longest block table
    H  query heads                       KH  key/value heads (KH divides H: grouped-query attention)
    D  head dimension                    N   physical blocks         S  block size

Dead slots (the unfilled tail of a last block, and the padding of short block tables) may hold any number, even NaN,
from an earlier sequence. No function here lets them affect a result.

A quantized cache is int8, with a float32 scale per slot and key/value head: ``k_scale`` and ``v_scale``, [N, S, KH];
they are ``None`` for a cache that is not quantized. With one scale per slot, a block can be filled token by token: a
scale for a whole block might have to grow with a later token, and all numbers in the block would have to be rounded
again. A scale costs 4 bytes per D numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Scatters this step's keys and values into their slots (paper §5.1, "fused reshape and block write").

    k, v: [T, KH, D]; caches: [N, S, KH, D], changed in place, as are their scales; slot_mapping: [T],
    slot = block · S + offset.
    """
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is not None:
            x, scale.flatten(0, 1)[slot_mapping] = quantize(x)
        cache.flatten(0, 1)[slot_mapping] = x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: rotates channels i and i + D/2 as a pair, the layout of Hugging Face checkpoints.

    x: [T, H, D]; cos, sin: [T, 1, D], of the angles; both channels of a pair have the same angle.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


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
    """Rotates queries and keys by their positions and stores keys and values: `rotate`, then `store_kv`.

    The cache holds rotated keys: a token's position never changes, so blocks can be shared. Returns rotated queries.
    """
    store_kv(rotate(k, cos, sin), v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return rotate(q, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: scales vectors to a root mean square of 1, then channels by a learned weight. [..., C] → [..., C]."""
    # In float32: squares overflow float16, and bfloat16 drops the small terms of a long sum.
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm: returns x + delta and the `rms_norm` of that. x, delta: [T, C]; weight: [C]."""
    x = x + delta
    return x, rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation: silu(gate) · up, where gate and up are the halves of each row. [T, 2·F] → [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes to int8 with scales, such that number ≈ int8 · scale: [..., D] → [..., D] and [...] float32."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / 127
    divisor = scale.where(scale != 0, 1)  # a vector of zeros has scale 0
    return (x / divisor[..., None] + 0.5).floor().to(torch.int8), scale  # as the kernels round, which lack round()


def dequantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Converts back to ``dtype``; returns ``x`` itself if it is not quantized. x: [..., D]; scale: [...]."""
    return x if scale is None else (x.float() * scale[..., None]).to(dtype)


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
    """Attention of one query per sequence over its blocks, the whole batch at once (paper §4.1, equation 4).

    Blocks are gathered into a padded [B, M · S] context and masked by length: the gather is the cost of paging in
    plain torch; a kernel that follows the block table itself does not need it.

    q: [B, H, D]; caches: [N, S, KH, D]; block_tables: [B, M]; context_lens: [B], the query's own token included.
    Returns [B, H, D].
    """
    B, H, D = q.shape
    KH = k_cache.shape[2]
    length = block_tables.shape[1] * k_cache.shape[1]
    slot = torch.arange(length, device=q.device)
    alive = slot < context_lens[:, None]  # [B, M · S]
    visible = alive if sliding_window is None else alive & (slot >= context_lens[:, None] - sliding_window)

    def gather(cache: Tensor, cache_scale: Tensor | None) -> Tensor:
        block_scale = None if cache_scale is None else cache_scale[block_tables]
        context = dequantize(cache[block_tables], block_scale, q.dtype).view(B, length, KH, D)
        # 0 · NaN is NaN: if only the scores were masked, a dead value could still make the weighted sum NaN.
        return context.masked_fill_(~alive[:, :, None, None], 0).transpose(1, 2)  # [B, KH, M · S, D]

    # The H/KH query heads that share a key/value head become rows of one small matrix, so keys are not repeated.
    out = F.scaled_dot_product_attention(
        q.reshape(B, KH, H // KH, D),
        gather(k_cache, k_scale),
        gather(v_cache, v_scale),
        attn_mask=visible[:, None, None],
        scale=scale,
    )
    return out.reshape(B, H, D)


def attention_weights(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    context_len: int,
    scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """The attention weights of one query over its context: the softmax inside `paged_decode`, a row per query head.

    q: [H, D]; k_cache: [N, S, KH, D]; block_table: [M], at least as many blocks as the context fills.
    Returns [H, context_len] in float32; each row sums to 1.
    """
    S, KH = k_cache.shape[1:3]
    blocks = block_table[: -(-context_len // S)]
    k = dequantize(k_cache[blocks], None if k_scale is None else k_scale[blocks], torch.float32)
    k = k.flatten(0, 1)[:context_len].float()  # [context_len, KH, D]
    k = k.repeat_interleave(q.shape[0] // KH, dim=1)  # H / KH query heads share a key head
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of several queries per sequence: prefill of whole prompts, or of chunks with earlier context.

    q: [sum(query_lens), H, D], sequences concatenated; caches: [N, S, KH, D]; block_tables: [B, M].
    Sequence b's queries are its last query_lens[b] of context_lens[b] tokens. Returns the shape of q.
    """
    S = k_cache.shape[1]
    outs = []
    for b, queries in enumerate(q.split(query_lens)):
        length, count = context_lens[b], query_lens[b]
        blocks = block_tables[b, : -(-length // S)]
        k = dequantize(k_cache[blocks], None if k_scale is None else k_scale[blocks], q.dtype)
        v = dequantize(v_cache[blocks], None if v_scale is None else v_scale[blocks], q.dtype)
        k, v = k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]  # [length, KH, D]
        q_, k_, v_ = queries.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        whole = count == length and sliding_window is None  # for is_causal, torch skips the masked half
        visible = None if whole else _visible(count, length, sliding_window, q.device)
        out = F.scaled_dot_product_attention(
            q_, k_, v_, attn_mask=visible, is_causal=whole, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))  # [1, H, count, D] → [count, H, D]
    return torch.cat(outs)


def _visible(count: int, length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which of ``length`` keys each of the last ``count`` tokens sees: [count, length]."""
    position = torch.arange(length - count, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    visible = key <= position
    if sliding_window is not None:
        visible &= key > position - sliding_window
    return visible


def copy_blocks(caches: list[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copies whole blocks src[i] → dst[i] in every cache (copy-on-write, paper §4.4).

    All reads happen before any write, so a source block may be freed and allocated again as a target in the same
    step. caches: each [N, S, KH, D]; src, dst: [number of copies].
    """
    swap_blocks(caches, caches, src, dst)


def swap_blocks(sources: list[Tensor], targets: list[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copies blocks src[i] of each source to blocks dst[i] of its target (swapping, paper §4.5).

    The devices may differ. sources, targets: each [some number of blocks, S, KH, D]; src, dst: [number of copies].
    """
    for source, target in zip(sources, targets, strict=True):
        target[dst.to(target.device)] = source[src.to(source.device)].to(target.device)
