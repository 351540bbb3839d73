"""Compiles every Triton kernel ahead of time, without a GPU, and reports registers, spills and shared memory.

Triton can compile for any target. To compile exactly what the engine would run, the report calls the launchers
themselves, with small tensors on the CPU, and replaces each kernel by a `Recorder`, which records its arguments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minipaged.kernels import copy_blocks, fused, paged_decode, paged_prefill, store_kv

TARGETS = (80, 90)  # compute capabilities of A100 and H100
KERNELS: dict[str, ModuleType] = {
    "_store_kernel": store_kv,
    "_decode_kernel": paged_decode,
    "_merge_kernel": paged_decode,
    "_prefill_kernel": paged_prefill,
    "_copy_kernel": copy_blocks,
    "_add_norm_kernel": fused,
    "_rope_store_kernel": fused,
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Variant:
    """One way of calling a launcher. ``main``: a common one for serving models, so it must not spill registers."""

    name: str
    launch: Callable[[], object]
    main: bool = True


@dataclass(frozen=True)
class Launch:
    """A kernel launch: the properties of its arguments that determine how the kernel is compiled."""

    source: ASTSource
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one kernel in one variant."""

    variant: str
    kernel: str
    capability: int  # 80: sm_80
    registers: int  # per thread, at most 255
    spilled: int  # bytes of stack per thread, for registers that did not fit
    shared: int  # bytes of shared memory per program
    tensor_cores: int  # matrix instructions in the machine code
    async_copies: int  # loads that bypass registers into shared memory while the program computes
    main: bool
    ptx: str
    sass: str

    @property
    def short_name(self) -> str:
        return self.kernel.strip("_").removesuffix("_kernel")


class Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 1 <= len(grid) <= 3 and all(0 < n < 65536 for n in grid[1:]), f"no GPU has such a grid: {grid}"
        return self._record

    def _record(self, *args: Any, **named: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {name: named.pop(name) for name in names if name in named}
        signature, constants, attrs = {}, {}, {}
        for i, (name, param) in enumerate(zip(names, self.kernel.params, strict=True)):
            signature[name], divisible = _type_of(values[name], param)
            if signature[name] == "constexpr":
                constants[(i,)] = values[name]
            elif divisible and not param.do_not_specialize and not param.do_not_specialize_on_alignment:
                attrs[(i,)] = [["tt.divisibility", 16]]
        self.launches.append(Launch(ASTSource(self.kernel, signature, constants, attrs), named))


def _type_of(value: Any, param: Any) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether its value or address is a multiple of 16: as the JIT does."""
    if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
        return "constexpr", False
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def variants() -> Iterator[Variant]:
    """Yields every kind of launch: dtypes, grouping, head dimensions, windows, splits, quantized caches."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for what, launch in ATTENTION.items():
            for shape, (heads, kv_heads, dim) in SHAPES.items():
                common = dtype is not torch.float32 and dim <= 128
                yield Variant(f"{what} {name} {shape}", partial(launch, dtype, dtype, heads, kv_heads, dim), common)
        yield Variant(f"add_norm {name}", partial(_add_norm, dtype))
    for what, launch in ATTENTION.items():
        yield Variant(f"{what} int8 llama", partial(launch, torch.bfloat16, torch.int8, *SHAPES["llama"]))
    yield Variant("copy", _copy)


SHAPES = {"llama": (32, 8, 128), "gpt2": (12, 12, 64), "smol": (9, 3, 64), "odd": (4, 2, 80), "wide": (8, 1, 256)}


def _caches(dtype: torch.dtype, kv_heads: int, dim: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Caches of 40 blocks of 16 slots, and scales if they are quantized."""
    k_cache, v_cache = torch.zeros(2, 40, 16, kv_heads, dim, dtype=dtype)
    scales = {}
    if dtype is torch.int8:
        scales = {name: torch.zeros(40, 16, kv_heads) for name in ("k_scale", "v_scale")}
    return {"k_cache": k_cache, "v_cache": v_cache}, scales


def _decode(
    dtype: torch.dtype, cache: torch.dtype, heads: int, kv_heads: int, dim: int, processors: int = 1,
    window: int | None = None,
) -> None:  # fmt: skip
    caches, scales = _caches(cache, kv_heads, dim)
    tables = torch.zeros(2, 400, dtype=torch.int64)
    q, lens = torch.zeros(2, heads, dim, dtype=dtype), torch.tensor([1, 6400])
    with patch.object(paged_decode, "_num_processors", lambda _: processors):
        paged_decode.paged_decode(
            q, **caches, block_tables=tables, context_lens=lens, scale=0.1, sliding_window=window, **scales
        )


def _prefill(
    dtype: torch.dtype, cache: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None = None
) -> None:
    caches, scales = _caches(cache, kv_heads, dim)
    paged_prefill.paged_prefill(
        torch.zeros(9, heads, dim, dtype=dtype), **caches, block_tables=torch.zeros(2, 4, dtype=torch.int64),
        context_lens=[4, 20], query_lens=[4, 5], scale=0.1, sliding_window=window, **scales,
    )  # fmt: skip


def _store(dtype: torch.dtype, cache: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    caches, scales = _caches(cache, kv_heads, dim)
    k, v = torch.zeros(2, 3, kv_heads, dim, dtype=dtype)
    store_kv.store_kv(k, v, **caches, slot_mapping=torch.arange(3), **scales)


def _rope_store(dtype: torch.dtype, cache: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    caches, scales = _caches(cache, kv_heads, dim)
    q, k, v = torch.zeros(3, heads + 2 * kv_heads, dim, dtype=dtype).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = torch.zeros(2, 3, 1, dim, dtype=dtype)
    fused.rope_store(q, k, v, cos, sin, **caches, slot_mapping=torch.arange(3), **scales)


def _add_norm(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 4096, dtype=dtype)
    fused.add_norm(x, x, x[0], 1e-5)


def _copy() -> None:
    caches, blocks = [torch.zeros(4, 16, 8, 128, dtype=torch.float16)], torch.arange(2)
    copy_blocks.copy_blocks(caches, blocks, blocks + 2)


ATTENTION: dict[str, Callable[..., None]] = {
    "store": _store,
    "rope_store": _rope_store,
    "decode": _decode,
    "decode split": partial(_decode, processors=132),
    "decode window": partial(_decode, window=100),
    "prefill": _prefill,
    "prefill window": partial(_prefill, window=100),
}


def launches(variant: Variant) -> list[Launch]:
    """The launches that the variant's launcher makes."""
    found: list[Launch] = []
    with ExitStack() as stack:
        for name, module in KERNELS.items():
            stack.enter_context(patch.object(module, name, Recorder(getattr(module, name), found)))
        variant.launch()
    return found


def compile_all(chosen: Iterable[Variant], targets: Iterable[int] = TARGETS) -> Iterator[Compiled]:
    """Compiles each variant for each target (80: sm_80). Takes half a second per kernel, less if Triton cached it."""
    done = set()
    for variant in chosen:
        for launch in launches(variant):
            for capability in targets:
                key = (launch.source.hash(), tuple(launch.options.items()), capability)
                if key not in done:  # variants with different arguments may compile to the same kernel
                    done.add(key)
                    yield _compile(variant, launch, capability)


def _compile(variant: Variant, launch: Launch, capability: int) -> Compiled:
    kernel = triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = _tool("-res-usage", file), _tool("-sass", file)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(
        variant.name,
        launch.source.name,
        capability,
        registers,
        stack,
        kernel.metadata.shared,
        len(re.findall(r"\b(?:HMMA|IMMA|HGMMA|IGMMA)\.", sass)),
        len(re.findall(r"\bLDGSTS\b", sass)),
        variant.main,
        ptx,
        sass,
    )


def _tool(option: str, file: Path) -> str:
    """The output of cuobjdump, which is part of Triton's package."""
    path = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([path, option, str(file)], check=True, capture_output=True, text=True).stdout


LINE = "{:<26} {:<10} {:<6} {:>9} {:>7} {:>7} {:>7} {:>7}"
HEADER = LINE.format("variant", "kernel", "target", "registers", "spilled", "shared", "mma", "async")
LEGEND = (
    "registers: of a thread, 255 at most. spilled: bytes of a thread that did not fit into them. shared: bytes of a "
    "program.\nmma: tensor core instructions. async: loads straight into shared memory, while the program computes. "
    "Counted in the machine code."
)


def line(c: Compiled) -> str:
    """A line of the report, under `HEADER`."""
    counts = (c.registers, c.spilled, c.shared, c.tensor_cores, c.async_copies)
    return LINE.format(c.variant, c.short_name, f"sm_{c.capability}", *counts)
