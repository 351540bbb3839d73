"""Copies whole KV blocks in all layers at once: copy-on-write (PagedAttention paper §4.4), and swapping (`swap.py`).

A model with 32 layers has 64 caches (keys and values), each a separate tensor. The kernel gets a table of their
addresses, so that one launch serves all of them.

    pairs      (7 → 2)   (4 → 9)                       grid: pairs × chunks × caches
    cache 0    ░░░▓░░░░░ chunk 0 │ chunk 1 │ chunk 2     a program: one chunk of one block of one cache
    cache 1    ░░░░░░░░░ chunk 0 │ chunk 1 │ chunk 2
    …                    └─ WORDS words ─┘

Blocks are copied as integer words, for any dtype: the widest word that divides the block's size and address.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels import reference

WORD_TYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
WORDS = 1024  # copied by one program


@triton.jit(do_not_specialize_on_alignment=["dst_ptr"])
def _copy_kernel(
    source_ptr,  # [caches] int64: addresses of the caches to read
    target_ptr,  # [caches] int64: addresses of the caches to write
    src_ptr,  # [pairs] int64: blocks
    dst_ptr,  # [pairs] int64
    source_block,  # words from one block to the next
    target_block,
    words,  # in one block
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
):
    pair, cache = tl.program_id(0), tl.program_id(2)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    source = tl.load(source_ptr + cache).to(tl.pointer_type(WORD))
    target = tl.load(target_ptr + cache).to(tl.pointer_type(WORD))
    src, dst = tl.load(src_ptr + pair), tl.load(dst_ptr + pair)  # int64, hence the offsets too
    value = tl.load(source + src * source_block + word, mask=word < words)
    tl.store(target + dst * target_block + word, value, mask=word < words)


def copy_blocks(caches: list[Tensor], src: Tensor, dst: Tensor) -> None:
    """`reference.copy_blocks` in one launch. src, dst: [pairs] int64 on the CPU, so that it can check for overlaps."""
    if set(src.tolist()) & set(dst.tolist()):
        # A launch's programs run in no fixed order: if a block is both read and written, torch's two steps are needed.
        return reference.copy_blocks(caches, src, dst)
    launch_copies(caches, caches, src, dst, caches[0].device)


def launch_copies(sources: list[Tensor], targets: list[Tensor], src: Tensor, dst: Tensor, device: torch.device) -> None:
    """Copies block src[i] of every source to block dst[i] of its target. ``device`` can access all of them.

    Within a block, caches are contiguous; they have the same shape (except the number of blocks), dtype and strides.
    """
    block_bytes = sources[0][0].nbytes
    strides = [caches[0].stride(0) * caches[0].itemsize for caches in (sources, targets)]
    addresses = [tuple(cache.data_ptr() for cache in caches) for caches in (sources, targets)]
    together = gcd(block_bytes, *strides, *addresses[0], *addresses[1])
    word = next(word for word in WORD_TYPES if together % word == 0)
    words = block_bytes // word
    pairs = torch.stack((src, dst)).to(device, non_blocking=True)
    _copy_kernel[len(src), triton.cdiv(words, WORDS), len(sources)](
        _table(addresses[0], device), _table(addresses[1], device), pairs[0], pairs[1],
        strides[0] // word, strides[1] // word, words, WORD=WORD_TYPES[word], WORDS=WORDS, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


@lru_cache(maxsize=16)  # a cache's address does not change while its engine exists
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)
