"""Lab A3: a Triton kernel that follows block tables.

You write the functions that raise NotImplementedError. README.md, beside this file, says what they must do.

Letters used in shapes:

    B  sequences                         M   blocks in the longest block table
    H  query heads                       KH  key/value heads (KH divides H)
    D  head dimension                    N   physical blocks         S  block size
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


# lab: A3.1, A3.2, A3.3, A3.4
@triton.jit
def decode_kernel(
    q_ptr,  # [B, H, D]
    k_ptr,  # [N, S, KH, D], as v
    v_ptr,
    table_ptr,  # [B, M] int64
    len_ptr,  # [B] int64
    out_ptr,  # [B, H, D]
    scale,
    q_seq,  # strides, in elements: how far it is from one sequence to the next, one head to the next, …
    q_head,
    kv_block,
    kv_slot,
    kv_head,
    table_seq,
    out_seq,
    out_head,
    GROUP: tl.constexpr,  # query heads that share a key/value head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_DIM and BLOCK_SIZE, rounded up to powers of two
    SLOTS: tl.constexpr,
):
    """One program: one sequence, one query head. It walks through the sequence's blocks, one at a time."""
    seq, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(len_ptr + seq)
    slot, dim = tl.arange(0, SLOTS), tl.arange(0, DIMS)
    live_dim = dim < HEAD_DIM
    q = tl.load(q_ptr + seq * q_seq + head * q_head + dim, mask=live_dim, other=0.0).to(tl.float32)

    peak = float("-inf")  # of the blocks so far: the largest score,
    total = 0.0  # the sum of exp(score - peak),
    acc = tl.zeros([DIMS], tl.float32)  # and the sum of exp(score - peak) · v
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + seq * table_seq + start // BLOCK_SIZE).to(tl.int64)
        alive = (slot < BLOCK_SIZE) & (start + slot < length)
        at = block * kv_block + slot * kv_slot + (head // GROUP) * kv_head
        live = alive[:, None] & live_dim[None, :]
        k = tl.load(k_ptr + at[:, None] + dim[None, :], mask=live, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=live, other=0.0).to(tl.float32)

        scores = tl.where(alive, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp(scores - new_peak)
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink + tl.sum(weights[:, None] * v, axis=0)
        peak = new_peak

    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + seq * out_seq + head * out_head + dim, out, mask=live_dim)


# lab: A3.1, A3.2, A3.3, A3.4
def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Launches `decode_kernel`: attention of one query per sequence over its blocks, into ``out``.

    q, out: [B, H, D]; k_cache, v_cache: [N, S, KH, D], with equal strides; block_tables: [B, M] int64;
    context_lens: [B] int64, at least 1. All may have any strides, except that the last dimension's is 1.
    """
    B, H, D = q.shape
    S, KH = k_cache.shape[1:3]
    decode_kernel[(B, H)](
        q, k_cache, v_cache, block_tables, context_lens, out, scale,
        *q.stride()[:2], *k_cache.stride()[:3], block_tables.stride(0), *out.stride()[:2],
        GROUP=H // KH, HEAD_DIM=D, BLOCK_SIZE=S, DIMS=triton.next_power_of_2(D), SLOTS=triton.next_power_of_2(S),
    )  # fmt: skip


def run_in_buffers(buffers: list[Tensor], views: list[list], context_lens: Tensor, scale: float) -> Tensor:
    """Calls `paged_decode` on tensors that lie in larger buffers, as they do in an engine. The checks come in here.

    ``views``: shape, strides and offset of q, k_cache, v_cache, block_tables and out in their buffers. Returns the
    whole buffer of out.
    """
    tensors = [torch.as_strided(buffer, *view) for buffer, view in zip(buffers, views, strict=True)]
    q, k_cache, v_cache, block_tables, out = tensors
    paged_decode(q, k_cache, v_cache, block_tables, context_lens, scale, out)
    return buffers[-1]
