"""Lab A7: split-KV attention."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from minipaged.labs.lab import Lab, Mutant, Source, Task

LOADING = 4.0  # seconds, for torch; the checks themselves take tenths
TILE = 64  # tokens, for which the engine's least split is this lab's LEAST_TOKENS


def engine() -> dict[str, Any]:
    """The engine's choice of splits. Its merging happens on the GPU, in units of its own: the lab's stands in."""
    from minipaged.kernels.paged_decode import splits_of
    from minipaged.labs.a7 import reference

    def num_splits(longest: int, programs: int, processors: int) -> int:
        return splits_of(longest, TILE, programs, processors)

    rest = {name: getattr(reference, name) for name in ("attend", "merge", "split_attention")}
    return {"num_splits": num_splits, **rest}


def _engine() -> Callable[[], dict[str, Any]] | None:
    """Where there is no Triton, there is nothing to compare with."""
    return engine if find_spec("triton") else None


MUTANTS = (
    Mutant(
        "a batch with more programs than the GPU has room for gets 0 splits, and so no result",
        "A7.1",
        "max(1, min(wanted, longest // LEAST_TOKENS, MAX_SPLITS))",
        "min(wanted, longest // LEAST_TOKENS, MAX_SPLITS)",
    ),
    Mutant(
        "more splits than there is room for when they are merged: the last ones are lost",
        "A7.1",
        "longest // LEAST_TOKENS, MAX_SPLITS)",
        "longest // LEAST_TOKENS)",
    ),
    Mutant(
        "exponentials of the scores as they are: large scores become infinite",
        "A7.2",
        "    m = scores.amax(dim=1)\n",
        "    m = torch.zeros_like(q[:, 0])\n",
    ),
    Mutant(
        "a split without tokens has the largest score 0, which hides the negative ones of others",
        "A7.2",
        "torch.full_like(q[:, 0], -torch.inf)",
        "torch.zeros_like(q[:, 0])",
    ),
    Mutant(
        "parts are added as if all had the same largest score",
        "A7.3",
        "parts = (o * shrink[:, :, None])",
        "parts = (o * torch.ones_like(shrink)[:, :, None])",
    ),
    Mutant(
        "the sums of parts are added without weights",
        "A7.3",
        "(l * shrink).sum(dim=0)",
        "l.sum(dim=0)",
    ),
    Mutant(
        "what an empty split left unwritten gets weight 0, and NaN stays NaN",
        "A7.4",
        ".where(some[:, :, None], 0.0)",
        "",
    ),
    Mutant(
        "with nothing but empty splits, minus infinity minus minus infinity is NaN",
        "A7.4",
        "torch.exp(m - peak).where(some, 0.0)",
        "torch.exp(m - peak)",
    ),
)

LAB = Lab(
    key="A7",
    title="Split-KV attention",
    minutes=60,
    file="split_kv.py",
    sources=(Source("minipaged.labs.a7.reference"),),
    tasks=(
        Task("A7.1", "How many splits", 2, seconds=LOADING),
        Task("A7.2", "One split", 3, seconds=LOADING),
        Task("A7.3", "Merge", 3, needs=("A7.2",), seconds=LOADING),
        Task("A7.4", "Empty splits", 2, needs=("A7.1", "A7.3"), seconds=LOADING),
    ),
    mutants=MUTANTS,
    preload=("torch",),
    memory=16 << 30,
    engine=_engine(),
)
