"""Mutation tests of the kernel checks: typical bugs are inserted one at a time, and the named check must fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from minipaged.kernels import tiles
from tests.kernels.interpreted.checks import MODULES, check_copies, check_decode, check_prefill, check_store

FILES = {module.__name__: Path(module.__file__) for module in (tiles, *MODULES)}


@dataclass(frozen=True)
class Mutant:
    bug: str
    file: str
    right: str  # occurs once in the file …
    wrong: str  # … and is replaced by this
    killed_by: Callable[..., None]


@contextmanager
def mutated(mutant: Mutant, folder: Path) -> Iterator[SimpleNamespace]:
    """The kernels, loaded again from their files with the bug inserted in one of them."""
    loaded: dict[str, ModuleType] = {}
    with patch.dict(sys.modules):
        for name, path in FILES.items():
            source = path.read_text(encoding="utf-8")
            if path.stem == mutant.file:
                assert source.count(mutant.right) == 1, f"{path.name} changed: adapt the mutant {mutant.bug!r}"
                source = source.replace(mutant.right, mutant.wrong)
            copy = folder / path.name  # triton reads the source from the file
            copy.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(name, copy)
            loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
    yield SimpleNamespace(**{name.split(".")[-1]: module for name, module in loaded.items()})


SPLITS = partial(check_decode, dim=128, splits=4, lengths=[1, 15, 16, 17, 65])
WINDOW = partial(check_prefill, heads=(1, 1), dtype=torch.float16, window=2, chunks=[(130, 130)])
MUTANTS = [
    Mutant(
        "dead slots are loaded (and masked only in the softmax, which 0 · NaN survives)",
        "paged_decode",
        "mask=alive[:, None] & live_dim[None, :]",
        "mask=live_dim[None, :]",
        check_decode,
    ),
    Mutant(
        "the sum is not rescaled when a larger score comes",
        "tiles",
        "total = total * shrink + ",
        "total = total + ",
        partial(check_decode, dim=128),
    ),
    Mutant(
        "the weighted values are not rescaled when a larger score comes",
        "tiles",
        "acc * shrink[:, None]",
        "acc",
        partial(check_decode, dim=128),
    ),
    Mutant(
        "a maximum of -inf turns rows without visible keys so far into NaN",
        "tiles",
        "tl.constexpr(-3.0e38)",
        'tl.constexpr(float("-inf"))',
        WINDOW,
    ),
    Mutant(
        "a query sees the token after it",
        "paged_prefill",
        "position[None, :] <= here",
        "position[None, :] <= here + 1",
        check_prefill,
    ),
    Mutant(
        "a query does not see itself",
        "paged_prefill",
        "position[None, :] <= here",
        "position[None, :] < here",
        check_prefill,
    ),
    Mutant(
        "the window is one token too wide",
        "paged_prefill",
        "visible &= position[None, :] > here - window",
        "visible &= position[None, :] >= here - window",
        partial(check_prefill, window=4),
    ),
    Mutant(
        "the window of a decode is one token too narrow",
        "paged_decode",
        "length - window",
        "length - window + 1",
        partial(check_decode, window=4),
    ),
    Mutant(
        "splits overlap",
        "paged_decode",
        "tl.minimum(begin + split_len, length)",
        "length",
        SPLITS,
    ),
    Mutant(
        "splits leave out the end of the context",
        "paged_decode",
        "tl.cdiv(tl.cdiv(length - oldest, splits), KEYS)",
        "(length - oldest) // splits // KEYS",
        SPLITS,
    ),
    Mutant(
        "splits have equal weights instead of their sums",
        "paged_decode",
        "weight = tl.exp2(tl.load(lse_ptr + row * splits + i) - peak)",
        "weight = total / splits",
        SPLITS,
    ),
    Mutant(
        "rows that pad the tile are stored",
        "paged_decode",
        "live = live_row[:, None] & live_dim[None, :]",
        "live = live_row[:, None] | live_dim[None, :]",
        partial(check_decode, heads=(3, 1)),
    ),
    Mutant(
        "all query heads are one group",
        "paged_prefill",
        "head * GROUP + row % GROUP",
        "row % GROUP",
        check_prefill,
    ),
    Mutant(
        "the block table is ignored and blocks are read as contiguous",
        "tiles",
        "tl.load(table_ptr + positions // BLOCK_SIZE, mask=alive, other=0)",
        "tl.where(alive, positions // BLOCK_SIZE, 0)",
        check_decode,
    ),
    Mutant(
        "a store writes past the head dimension",
        "store_kv",
        "live = (head < KV_HEADS) & (dim < HEAD_DIM)",
        "live = (head < KV_HEADS) & (dim <= HEAD_DIM)",
        check_store,
    ),
    Mutant(
        "a store assumes the strides of contiguous keys",
        "store_kv",
        "k_ptr + token * k_token",
        "k_ptr + token * KV_HEADS * HEAD_DIM",
        check_store,
    ),
    Mutant(
        "int8 is truncated instead of rounded",
        "store_kv",
        "tl.div_rn(x, divisor) + 0.5",
        "tl.div_rn(x, divisor)",
        partial(check_store, int8=True),
    ),
    Mutant(
        "copies write past the block",
        "copy_blocks",
        "tl.store(target + dst * target_block + word, value, mask=word < words)",
        "tl.store(target + dst * target_block + word, value)",
        check_copies,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_the_bug_is_noticed(mutant, tmp_path):
    with mutated(mutant, tmp_path) as kernels, pytest.raises((AssertionError, FloatingPointError)):
        mutant.killed_by(kernels)


def test_without_a_bug_the_checks_pass(tmp_path):
    with mutated(Mutant("none", "", "", "", check_decode), tmp_path) as kernels:
        for check in {id(mutant.killed_by): mutant.killed_by for mutant in MUTANTS}.values():
            check(kernels)
