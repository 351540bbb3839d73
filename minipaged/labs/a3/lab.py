"""Lab A3: a decode kernel in Triton."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from minipaged.labs.lab import Lab, Mutant, Source, Task

LOADING = 5.0  # seconds, for torch and Triton; the checks themselves take one at most


def engine() -> dict[str, Any]:
    """The engine's kernel. It makes the tensor for its result itself, so here this is copied to where it belongs."""
    import torch
    from torch import Tensor

    from minipaged.kernels.paged_decode import paged_decode

    def run_in_buffers(buffers: list[Tensor], views: list[list], context_lens: Tensor, scale: float) -> Tensor:
        tensors = [torch.as_strided(buffer, *view) for buffer, view in zip(buffers, views, strict=True)]
        q, k_cache, v_cache, block_tables, out = tensors
        out.copy_(paged_decode(q, k_cache, v_cache, block_tables, context_lens, scale))
        return buffers[-1]

    return {"run_in_buffers": run_in_buffers}


def needs() -> str:
    return "" if find_spec("triton") else "Triton is not installed, and exists for Linux only (pip install triton)"


MUTANTS = (
    Mutant(
        "the number of a block is looked up for the wrong sequence of a batch",
        "A3.5",
        "table_ptr + seq * table_seq + start // BLOCK_SIZE",
        "table_ptr + start // BLOCK_SIZE",
    ),
    Mutant(
        "what was summed up before a larger score came is not made smaller",
        "A3.1",
        "acc = acc * shrink + ",
        "acc = acc + ",
    ),
    Mutant(
        "a last block that is not full is left out",
        "A3.1",
        "range(0, length, BLOCK_SIZE)",
        "range(0, tl.maximum(length // BLOCK_SIZE, 1) * BLOCK_SIZE, BLOCK_SIZE)",
    ),
    Mutant(
        "exponentials of the scores as they are: large scores become infinite",
        "A3.1",
        "new_peak = tl.maximum(peak, tl.max(scores, axis=0))",
        "new_peak = tl.maximum(peak, 0.0) * 0.0",
    ),
    Mutant(
        "values are loaded without a mask: NaN in a dead slot comes through, for 0 · NaN is NaN",
        "A3.2",
        "v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=live, other=0.0)",
        "v = tl.load(v_ptr + at[:, None] + dim[None, :])",
    ),
    Mutant(
        "the result is stored without a mask: what is beyond the head dimension overwrites a neighbour",
        "A3.2",
        "out_head + dim, out, mask=live_dim)",
        "out_head + dim, out)",
    ),
    Mutant(
        "query heads are dealt out to key heads in turn, instead of as neighbours",
        "A3.3",
        "(head // GROUP) * kv_head",
        "(head % GROUP) * kv_head",
    ),
    Mutant(
        "the queries' strides are taken for those of a tensor of its own: in a fused projection they are not",
        "A3.4",
        "*q.stride()[:2]",
        "H * D, D",
    ),
    Mutant(
        "the caches' strides are taken for granted",
        "A3.4",
        "*k_cache.stride()[:3]",
        "S * KH * D, KH * D, D",
    ),
)

LAB = Lab(
    key="A3",
    title="A decode kernel in Triton",
    minutes=120,
    file="decode_kernel.py",
    sources=(Source("minipaged.labs.a3.reference"),),
    tasks=(
        Task("A3.1", "Block by block", 4, seconds=LOADING),
        Task("A3.2", "Only what is yours", 3, needs=("A3.1",), seconds=LOADING),
        Task("A3.3", "Grouped queries", 1, needs=("A3.2",), seconds=LOADING),
        Task("A3.4", "Strides, and half precision", 1, needs=("A3.3",), seconds=LOADING),
        Task("A3.5", "Run in the engine", 1, needs=("A3.4",), seconds=LOADING),
    ),
    mutants=MUTANTS,
    preload=("torch", "triton", "triton.language", "triton.runtime.interpreter"),
    memory=16 << 30,
    environment={"TRITON_INTERPRET": "1"},
    engine=engine,
    needs=needs,
)
