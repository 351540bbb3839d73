"""Speed of the attention kernels: decode relative to the memory bandwidth, prefill relative to SDPA.

Shapes of Llama 3 8B: 32 query heads, 8 key/value heads, head dimension 128, bfloat16, blocks of 16. Each cell is
compared with the oracle in float64 before it is timed. Other implementations get the same keys and values of the same
pool, but contiguous per sequence, without a block table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device_timing import cache_size, compare, copy_bandwidth, free_memory, rate
from benchmarks.gpu.job import Job
from minipaged.kernels import reference
from minipaged.kernels.backend import kernels_for

BATCHES, CONTEXTS = (1, 4, 16, 64, 256), (512, 2048, 8192, 32768)
MAX_SETS = 64
CLOSE = 2e-2  # relative error; bfloat16 has 8 bits of precision

# Context length and number of queries of each sequence.
PREFILLS = {
    "1 prompt of 2048": [(2048, 2048)],
    "1 prompt of 8192": [(8192, 8192)],
    "8 prompts of 1024": [(1024, 1024)] * 8,
    "32 prompts of 512": [(512, 512)] * 32,
    "4 chunks of 512 after 7680": [(8192, 512)] * 4,
}
SMALL_PREFILLS = {"1 prompt of 40": [(40, 40)], "2 chunks of 8 after 24": [(32, 8)] * 2}


@dataclass(frozen=True)
class Shape:
    """The shape of attention: heads, key/value heads, head dimension, block size, dtype."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values per token, in one layer."""
        return 2 * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        return self.dim**-0.5


LLAMA = Shape(32, 8, 128, 16, torch.bfloat16)
SMALL = Shape(4, 2, 16, 4, torch.float32)


class Pool:
    """Random keys and values of ``tokens`` tokens; zeros would be read faster than real data."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device) -> None:
        self.shape, self.device, self.num_blocks = shape, device, tokens // shape.block_size
        size = (self.num_blocks, shape.block_size, shape.kv_heads, shape.dim)
        self.k, self.v = (torch.empty(size, dtype=shape.dtype, device=device).normal_() for _ in range(2))

    def tables(self, sets: int, batch: int, context: int) -> Tensor:
        """Block tables of scattered blocks, each used once: [sets, batch, M] int64."""
        blocks = torch.randperm(self.num_blocks, device=self.device)
        width = -(-context // self.shape.block_size)
        return blocks[: sets * batch * width].view(sets, batch, width)

    def contiguous(self, index: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Keys and values of set ``index``, contiguous per sequence: [batch, KH, context, D] each."""
        width = -(-context // self.shape.block_size)
        begin, end = index * batch * width, (index + 1) * batch * width

        def view(cache: Tensor) -> Tensor:
            return cache[begin:end].view(batch, -1, *cache.shape[2:])[:, :context].transpose(1, 2)

        return view(self.k), view(self.v)


# --- decode -------------------------------------------------------------------------------------------------


def decode(job: Job) -> None:
    """Bandwidth of `paged_decode` as a fraction of a copy's, for every batch size × context that fits."""
    torch.manual_seed(0)
    shape, batches, contexts = (SMALL, (1, 3), (9, 32)) if job.smoke else (LLAMA, BATCHES, CONTEXTS)
    kernels = kernels_for("torch" if job.smoke else "auto", job.device)
    bandwidth = copy_bandwidth(job.device, job.smoke)
    job.note(kernels=kernels.name, shape=str(shape), copy_bytes_per_second=bandwidth)
    room = int(0.85 * free_memory(job.device)) // shape.bytes_per_token
    cells = sorted(product(batches, contexts), key=lambda cell: -cell[0] * cell[1])  # the targets first
    width = {cell: cell[0] * -(-cell[1] // shape.block_size) * shape.block_size for cell in cells}
    fitting = [cell for cell in cells if width[cell] <= room]
    pool = Pool(shape, max(width[cell] for cell in fitting), job.device)
    for batch, context in cells:
        if (batch, context) not in fitting:
            job.row("cells", batch=batch, context=context, skipped="its KV does not fit into the memory")
        elif job.left() < 8:
            job.row("cells", batch=batch, context=context, skipped="the section's time is over")
        else:
            _decode_cell(job, kernels.paged_decode, pool, batch, context, bandwidth["median"])
    _decode_flex(job, pool, fitting, bandwidth["median"])


def _decode_cell(
    job: Job, paged_decode: Callable[..., Tensor], pool: Pool, batch: int, context: int, bandwidth: float
) -> None:
    shape, device = pool.shape, pool.device
    amount = batch * context * shape.bytes_per_token
    sets = _sets(pool, batch, context)
    tables = pool.tables(sets, batch, context)
    lens = torch.full((batch,), context, device=device)
    queries = torch.randn(sets, batch, shape.heads, shape.dim, device=device, dtype=shape.dtype)

    def ours(i: int) -> Callable[[], Tensor]:
        return lambda: paged_decode(queries[i], pool.k, pool.v, tables[i], lens, shape.scale)

    error = _error(ours(0)()[:2], _decode_oracle(pool, queries[0, :2], tables[0, :2], lens[:2]))
    if not error < CLOSE:
        job.fail(f"decode of batch {batch}, context {context} is off by {error:.2g}")
    ways: dict[str, Callable[[], Sequence[Callable[[], object]]]] = {"paged": lambda: [ours(i) for i in range(sets)]}
    for name, rival in {"sdpa": _sdpa_grouped, "sdpa_gqa": _sdpa_gqa}.items():
        ways[name] = lambda rival=rival: [  # type: ignore[misc]
            rival(queries[i], *pool.contiguous(i, batch, context), shape.scale) for i in range(sets)
        ]
    if device.type == "cuda" and find_spec("flashinfer"):
        ways["flashinfer"] = lambda: _flashinfer(queries, pool, tables, context)
    seconds = compare(ways, device, seconds=0.02 if job.smoke else 0.15)
    rates = {name: rate(found, amount) for name, found in seconds.items()}
    if "error" in rates["paged"]:
        job.fail(f"decode of batch {batch}, context {context}: {rates['paged']['error']}")
    fraction = rates["paged"]["median"] / bandwidth if "median" in rates["paged"] else None
    job.row("cells", batch=batch, context=context, fraction_of_copy=fraction, sets=sets, error=error,
            **{f"{name}_bytes_per_second": found for name, found in rates.items()})  # fmt: skip


def _sets(pool: Pool, batch: int, context: int) -> int:
    """How many inputs to cycle through, so that together they are four times as large as the GPU's cache."""
    one = batch * -(-context // pool.shape.block_size)
    wanted = -(-4 * cache_size(pool.device) // (one * pool.shape.block_size * pool.shape.bytes_per_token))
    return max(1, min(wanted, pool.num_blocks // one, MAX_SETS))


def _decode_oracle(pool: Pool, q: Tensor, tables: Tensor, lens: Tensor) -> Tensor:
    """The oracle's result in float64, on a cache of only the blocks in these tables."""
    k, v = (cache[tables.flatten()].double() for cache in (pool.k, pool.v))
    dense = torch.arange(tables.numel(), device=q.device).view(tables.shape)
    return reference.paged_decode(q.double(), k, v, dense, lens, pool.shape.scale)


def _error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; NaN, which fails every limit, if ``out`` contains one."""
    return float((out.double() - expected).norm() / expected.norm())


def _sdpa_grouped(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
    grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])  # treats the query heads of a key/value head as queries
    return lambda: F.scaled_dot_product_attention(grouped, k, v, scale=scale)


def _sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)


def _flashinfer(queries: Tensor, pool: Pool, tables: Tensor, context: int) -> list[Callable[[], Tensor]]:
    import flashinfer

    shape, device, (sets, batch, width) = pool.shape, pool.device, tables.shape
    workspace = torch.empty(2**27, dtype=torch.uint8, device=device)
    starts = torch.arange(0, (batch + 1) * width, width, dtype=torch.int32, device=device)
    last = torch.full((batch,), (context - 1) % shape.block_size + 1, dtype=torch.int32, device=device)

    def planned(i: int) -> Callable[[], Tensor]:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        sizes = (shape.heads, shape.kv_heads, shape.dim, shape.block_size)
        blocks = tables[i].flatten().int()
        wrapper.plan(starts, blocks, last, *sizes, q_data_type=shape.dtype, kv_data_type=shape.dtype)
        return lambda: wrapper.run(queries[i], (pool.k, pool.v))

    return [planned(i) for i in range(sets)]


def _decode_flex(job: Job, pool: Pool, cells: list[tuple[int, int]], bandwidth: float) -> None:
    """flex_attention on three contexts at the largest batch only, because it must be compiled for each shape."""
    if job.device.type != "cuda":
        return
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    shape = pool.shape
    for context in CONTEXTS[:3]:
        batch = max(batch for batch, other in cells if other == context)
        if job.left() < 45:  # compiling is slow
            job.row("flex", batch=batch, context=context, skipped="the section's time is over")
            continue
        k, v = pool.contiguous(0, batch, context)
        q = torch.randn(batch, shape.heads, 1, shape.dim, device=pool.device, dtype=shape.dtype)
        call = lambda q=q, k=k, v=v: compiled(q, k, v, scale=shape.scale, enable_gqa=True)  # noqa: E731
        seconds = compare({"flex": lambda call=call: [call]}, pool.device)["flex"]
        found = rate(seconds, batch * context * shape.bytes_per_token)
        fraction = found["median"] / bandwidth if "median" in found else None
        job.row("flex", batch=batch, context=context, fraction_of_copy=fraction, flex_bytes_per_second=found)


# --- prefill ------------------------------------------------------------------------------------------------


def prefill(job: Job) -> None:
    """FLOP/s of `paged_prefill`, counting only query–key pairs within the causal mask, compared with SDPA."""
    torch.manual_seed(0)
    shape, cells = (SMALL, SMALL_PREFILLS) if job.smoke else (LLAMA, PREFILLS)
    kernels = kernels_for("torch" if job.smoke else "auto", job.device)
    job.note(kernels=kernels.name, shape=str(shape))
    most = max(sum(length for length, _ in chunks) for chunks in cells.values())
    pool = Pool(shape, 2 * most, job.device)
    for name, chunks in cells.items():
        if job.left() < 8:
            job.row("cells", name=name, skipped="the section's time is over")
        else:
            _prefill_cell(job, kernels.paged_prefill, pool, name, chunks)


def _prefill_cell(
    job: Job, paged_prefill: Callable[..., Tensor], pool: Pool, name: str, chunks: list[tuple[int, int]]
) -> None:
    shape, device, batch, (length, count) = pool.shape, pool.device, len(chunks), chunks[0]
    tables = pool.tables(1, batch, length)[0]
    q = torch.randn(batch * count, shape.heads, shape.dim, device=device, dtype=shape.dtype)

    def ours() -> Tensor:
        return paged_prefill(q, pool.k, pool.v, tables, [length] * batch, [count] * batch, shape.scale)

    # Compares the last query of a sequence, which sees all of its context, and the first one, which sees the least.
    rows = torch.arange(batch, device=device)[:2] * count
    found, lens = ours(), torch.full((min(batch, 2),), length, device=device)
    ends = _decode_oracle(pool, q[rows + count - 1], tables[:2], lens)
    starts = _decode_oracle(pool, q[rows], tables[:2], lens - count + 1)
    error = _error(torch.cat((found[rows + count - 1], found[rows])), torch.cat((ends, starts)))
    if not error < CLOSE:
        job.fail(f"prefill of {name} is off by {error:.2g}")
    ways = {"paged": lambda: [ours], "sdpa": lambda: [_sdpa_causal(q, pool, batch, length, count)]}
    seconds = compare(ways, device, seconds=0.02 if job.smoke else 0.3)
    # 4 operations per dimension and query–key pair: QK and PV, each a multiplication and an addition.
    pairs = batch * count * (2 * length - count + 1) / 2
    rates = {way: rate(found, 4 * shape.heads * shape.dim * pairs) for way, found in seconds.items()}
    if "error" in rates["paged"]:
        job.fail(f"prefill of {name}: {rates['paged']['error']}")
    job.row("cells", name=name, error=error, **{f"{way}_flops": found for way, found in rates.items()})


def _sdpa_causal(q: Tensor, pool: Pool, batch: int, length: int, count: int) -> Callable[[], Tensor]:
    from torch.nn.attention.bias import causal_lower_right

    k, v = pool.contiguous(0, batch, length)
    q = q.view(batch, count, *q.shape[1:]).transpose(1, 2)
    masking: dict[str, Any] = {"is_causal": True} if count == length else {}

    def call() -> Tensor:
        mask = masking or {"attn_mask": causal_lower_right(count, length)}
        return F.scaled_dot_product_attention(q, k, v, scale=pool.shape.scale, enable_gqa=True, **mask)

    return call
