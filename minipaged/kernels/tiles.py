"""Functions that the attention kernels share: following a block table, and online softmax over tiles of keys.

    positions     0 1 2 3 │ 4 5 6 7 │ 8 9      of a sequence of 10 tokens, block size 4
    block table      [7        2       5]      logical block → physical block
    the cache     … block 2: 4 5 6 7 …  block 5: 8 9 · · …  block 7: 0 1 2 3 …      (·: dead slots)

A tile of keys is a range of *positions*, of any length: the kernel looks up the block of each position, so tiles and
blocks need not match, and the block size may be any number.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Softmax is computed in base 2, because GPUs have an instruction for 2^x only: e^x = 2^(x · log2 e).
LOG2_E = 1.4426950408889634

# The initial maximum. Finite, because -inf - -inf is NaN, and below any score that can occur.
EMPTY = tl.constexpr(-3.0e38)


@triton.jit
def offsets_of(positions, alive, table_ptr, block_stride, token_stride, BLOCK_SIZE: tl.constexpr):
    """Offsets in a cache, in elements, of the tokens at ``positions`` of a sequence; in block 0 if not ``alive``.

    int64, because caches of more than 2^31 numbers are common: 4 GB in float16.
    """
    block = tl.load(table_ptr + positions // BLOCK_SIZE, mask=alive, other=0).to(tl.int64)
    return block * block_stride + (positions % BLOCK_SIZE).to(tl.int64) * token_stride


@triton.jit
def attend(q, k, v, k_scale, v_scale, visible, scale, peak, total, acc):
    """Online softmax (Milakov & Gimelshein 2018; FlashAttention, algorithm 1): adds one more tile of keys.

    q: [rows, dims]; k: [dims, keys]; v: [keys, dims]; scale: log2 e included; k_scale, v_scale: [keys], or None if
    not quantized; visible: [rows, keys] or [1, keys]. Each row's state is its largest score so far, ``peak``, the sum
    ``total`` of 2^(score - peak), and ``acc``, the sum of values with the same weights. Returns the new state.
    """
    # "ieee": float32 stays float32 instead of being rounded to tf32's 10 bits. It does not affect 16-bit types.
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if k_scale is not None:
        scores *= k_scale[None, :]  # one factor per key, so it can be applied after the product
    scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)  # a higher peak reduces the weight of what was summed before
    total = total * shrink + tl.sum(weights, axis=1)
    if v_scale is not None:
        weights *= v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc


def tile_of(head_dim: int, itemsize: int) -> tuple[int, int]:
    """The size of a tile, (keys, dims), both powers of two, for queries of ``itemsize`` bytes.

    At most 8,192 numbers of 16 bits (16 KiB), so that the tiles of keys and values that are loaded ahead fit into
    shared memory. In float32 2,048 numbers: its products need more registers, because they do not use tensor cores. At
    least 16 in each dimension, which ``tl.dot`` needs; dims beyond ``head_dim`` are masked.
    """
    dims = max(16, triton.next_power_of_2(head_dim))
    return min(128, max(16, (8192 if itemsize == 2 else 2048) // dims)), dims
