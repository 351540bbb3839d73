"""Checks of kernels against their oracles, with traps for errors that the interpreter does not detect.

The interpreter checks no bounds. So memory that must not be read is NaN, which spreads, and every written tensor has a
fence of canaries, which must not change. The kernels are an argument: the same functions check the mutants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from minipaged.kernels import copy_blocks, fused, paged_decode, paged_prefill, reference, store_kv, swap

MODULES = (store_kv, paged_decode, paged_prefill, copy_blocks, swap, fused)
TRITON = SimpleNamespace(**{module.__name__.split(".")[-1]: module for module in MODULES})

FENCE = 4096  # elements on each side
CANARY = 77  # exact in every dtype
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
new_empty = Tensor.new_empty


class Fences:
    """Tensors with canaries around them."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def around(self, tensor: Tensor) -> Tensor:
        """Returns a copy of the tensor between two fences."""
        buffer = torch.full((tensor.numel() + 2 * FENCE,), CANARY, dtype=tensor.dtype)
        self.buffers.append(buffer)
        return buffer[FENCE:-FENCE].view(tensor.shape).copy_(tensor)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None, **rest: object) -> Tensor:
        """Replaces ``Tensor.new_empty``: fenced and full of NaN, like memory that was used before."""
        plain = new_empty(like, *shape, dtype=dtype or like.dtype, **rest)
        if plain.numel() == 0:  # the interpreter itself creates such tensors
            return plain
        return self.around(plain.fill_(torch.nan) if plain.is_floating_point() else plain.zero_())

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:FENCE] == CANARY).all() and (buffer[-FENCE:] == CANARY).all(), "written out of bounds"


@contextmanager
def fenced() -> Iterator[Fences]:
    fences = Fences()
    with patch.object(Tensor, "new_empty", lambda like, *shape, **named: fences.empty(like, *shape, **named)):
        yield fences
    fences.check()


def pages(lengths: list[int], block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple:
    """Random contexts in scattered blocks: (k_cache, v_cache, tables). All other slots of the caches are NaN."""
    torch.manual_seed(seed)
    counts = [-(-n // block_size) for n in lengths]
    # No sequence owns block 0, because padding entries of block tables are 0.
    blocks = iter((torch.randperm(sum(counts) + 2) + 1).tolist())
    caches = torch.full((2, sum(counts) + 3, block_size, kv_heads, dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for b, n in enumerate(lengths):
        for i in range(counts[b]):
            tables[b, i] = next(blocks)
        for position in range(n):
            block, offset = tables[b, position // block_size], position % block_size
            caches[:, block, offset] = torch.randn(2, kv_heads, dim).to(dtype)
    return *caches, tables


def quantized(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same caches as int8 with scales; scales of unused slots are NaN."""
    (k, k_scale), (v, v_scale) = reference.quantize(k_cache), reference.quantize(v_cache)
    return k, v, {"k_scale": k_scale, "v_scale": v_scale}


def assert_close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_decode(
    kernels: SimpleNamespace = TRITON,
    block_size: int = 5,
    dim: int = 8,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    splits: int = 1,
    lengths: list[int] | None = None,
    int8: bool = False,
) -> None:
    lengths = lengths or [1, block_size, block_size + 1, 37]
    k_cache, v_cache, tables = pages(lengths, block_size, heads[1], dim, dtype)
    q = torch.randn(len(lengths), 3, heads[0], dim, dtype=dtype)[:, 1]  # a view, as in the models
    k, v, scales = quantized(k_cache, v_cache) if int8 else (k_cache, v_cache, {})
    lens = torch.tensor(lengths)
    forced = {"splits_of": lambda *_: splits, "LEAST_TILES": 1}
    with fenced() as fences, patch.multiple(kernels.paged_decode, **forced):
        args = [fences.around(x) for x in (k, v, tables, lens)]
        out = kernels.paged_decode.paged_decode(q, *args, 0.3, window, **scales)
    wide = [x if int8 else x.double() for x in (k, v)]
    assert_close(out, reference.paged_decode(q.double(), *wide, tables, lens, 0.3, window, **scales), dtype)


def check_prefill(
    kernels: SimpleNamespace = TRITON,
    block_size: int = 5,
    dim: int = 8,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    chunks: list[tuple[int, int]] | None = None,
    int8: bool = False,
) -> None:
    """Checks prefill. ``chunks``: (context length, number of queries at its end) of each sequence."""
    # A whole prompt, later chunks of prompts, a chunk that ends with a block, a single token, a chunk of several tiles.
    chunks = chunks or [(7, 7), (20, 5), (2 * block_size, block_size), (33, 1), (41, 40)]
    lengths, counts = map(list, zip(*chunks, strict=True))
    k_cache, v_cache, tables = pages(lengths, block_size, heads[1], dim, dtype)
    q = torch.randn(sum(counts), 3, heads[0], dim, dtype=dtype)[:, 1]
    k, v, scales = quantized(k_cache, v_cache) if int8 else (k_cache, v_cache, {})
    with fenced() as fences:
        args = [fences.around(x) for x in (k, v, tables)]
        out = kernels.paged_prefill.paged_prefill(q, *args, lengths, counts, 0.3, window, **scales)
    wide = [x if int8 else x.double() for x in (k, v)]
    expected = reference.paged_prefill(q.double(), *wide, tables, lengths, counts, 0.3, window, **scales)
    assert_close(out, expected, dtype)


def check_store(
    kernels: SimpleNamespace = TRITON,
    block_size: int = 5,
    kv_heads: int = 3,
    dim: int = 33,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(7, 2, kv_heads, dim, dtype=dtype).unbind(1)  # views, as from a fused projection
    k[3, 0] = 0  # a vector of zeros has no scale to divide by
    slots = torch.randperm(4 * block_size)[:4].repeat_interleave(2)[:7].unique()
    k, v = k[: len(slots)], v[: len(slots)]
    storage = torch.int8 if int8 else dtype
    caches = [torch.full((4, block_size, kv_heads, dim), CANARY, dtype=storage) for _ in range(2)]
    scales = [torch.full((4, block_size, kv_heads), float(CANARY)) for _ in range(2)] if int8 else []
    expected = [x.clone() for x in caches + scales]
    reference.store_kv(k, v, *expected[:2], slots, *expected[2:])
    with fenced() as fences:
        found = [fences.around(x) for x in caches + scales]
        kernels.store_kv.store_kv(k, v, *found[:2], slots, *found[2:])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if int8 else 0, atol=0)


def check_copies(
    kernels: SimpleNamespace = TRITON, shape: tuple[int, ...] = (5, 3, 33), dtype: torch.dtype = torch.float16
) -> None:
    torch.manual_seed(0)
    src, dst = torch.tensor([0, 0, 4]), torch.tensor([2, 5, 3])
    caches = [torch.randn(6, *shape).to(dtype) for _ in range(3)]
    expected = [x.clone() for x in caches]
    reference.copy_blocks(expected, src, dst)
    with fenced() as fences:
        found = [fences.around(x) for x in caches]
        kernels.copy_blocks.copy_blocks(found, src, dst)
    assert all(map(torch.equal, found, expected))
