"""Lab A2: paged attention in torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from minipaged.labs.lab import Lab, Mutant, Source, Task

LOADING = 4.0  # seconds, for torch; the checks themselves take tenths


def engine() -> dict[str, Any]:
    """What the engine makes of a step's plan, and its kernel in torch."""
    import torch

    from minipaged.execution.batch import build_batch
    from minipaged.kernels.reference import paged_decode

    def slot_mapping(block_table: list[int], start: int, num_tokens: int, block_size: int) -> list[int]:
        tokens = [0] * num_tokens
        seq = SimpleNamespace(num_prompt=start + num_tokens)
        chunk = SimpleNamespace(
            seq=seq, token_ids=tokens, start=start, num_tokens=num_tokens, block_table=block_table, num_rows=1
        )
        plan: Any = SimpleNamespace(chunks=[chunk], maps=None)
        return build_batch(plan, block_size, torch.device("cpu")).slot_mapping.tolist()

    return {"slot_mapping": slot_mapping, "paged_attention": paged_decode}


MUTANTS = (
    Mutant(
        "the last token of a context is left out, the one that asks",
        "A2.5",
        "torch.arange(length) < context_lens[:, None]  #",
        "torch.arange(length) < (context_lens[:, None] - 1).clamp(min=1)  #",
    ),
    Mutant(
        "a prompt's second chunk is written over its first: positions are counted from the chunk's begin",
        "A2.1",
        "range(start, start + num_tokens)",
        "range(num_tokens)",
    ),
    Mutant(
        "the first token of a block is looked up in the block before",
        "A2.1",
        "block_table[p // block_size]",
        "block_table[max(p - 1, 0) // block_size]",
    ),
    Mutant(
        "one slot behind the context is read",
        "A2.2",
        "torch.arange(length) < context_lens",
        "torch.arange(length) <= context_lens",
    ),
    Mutant(
        "dead slots get the score 0 instead of minus infinity, and so a share of the softmax",
        "A2.2",
        "-torch.inf",
        "0.0",
    ),
    Mutant(
        "scores are masked, values are not: NaN that an earlier owner left comes through",
        "A2.3",
        "v = v.masked_fill(dead, 0)",
        "v = v",
    ),
    Mutant(
        "query heads are dealt out to key heads in turn, instead of as neighbours",
        "A2.4",
        "grouped = q.view(B, KH, H // KH, D)",
        "grouped = q.view(B, H // KH, KH, D).transpose(1, 2)",
    ),
)

LAB = Lab(
    key="A2",
    title="Paged attention in torch",
    minutes=60,
    file="attention.py",
    sources=(Source("minipaged.labs.a2.reference"),),
    tasks=(
        Task("A2.1", "Find the slots", 2, seconds=LOADING),
        Task("A2.2", "Attend through the table", 3, seconds=LOADING),
        Task("A2.3", "Dead slots", 2, needs=("A2.2",), seconds=LOADING),
        Task("A2.4", "Grouped queries", 2, needs=("A2.3",), seconds=LOADING),
        Task("A2.5", "Run in the engine", 1, needs=("A2.1", "A2.4"), seconds=LOADING),
    ),
    mutants=MUTANTS,
    preload=("torch",),
    memory=16 << 30,
    engine=engine,
)
