"""The overhead of a block table in decode attention (PagedAttention, §7.1, Fig. 18a), in real time on this device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.experiments.figures import lines
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.timing import compare, ratio

BATCHES, CONTEXTS, BLOCK_SIZES = (8, 32), (64, 256, 1024), (8, 16, 32, 128)
HEADS, HEAD_DIM = 8, 64
WHY = (
    "contiguous attention is torch's own, tuned for this device; paged attention is one short kernel for any block "
    "size or, without a C++ compiler, torch's attention on a copy gathered from the blocks"
)


def measure(quick: bool, progress: Progress) -> Result:
    """Latency of one decode step's attention, contiguous and paged, by batch, context and block size."""
    rounds = 10 if quick else 25
    data: dict[str, dict[str, list[float]]] = {}
    series: dict[str, tuple[list[float], list[float]]] = {}
    rows = []
    cases = [(batch, context) for batch in BATCHES for context in CONTEXTS]
    for done, (batch, context) in enumerate(cases):
        progress(done / len(cases), f"batch {batch}, context {context}")
        seconds = compare(_candidates(batch, context), rounds)
        data[f"batch {batch}, context {context}"] = seconds
        for name, values in seconds.items():
            xs, ys = series.setdefault(f"{name}, batch {batch}", ([], []))
            xs.append(context)
            ys.append(1e6 * sorted(values)[len(values) // 2])
        middle, spread = ratio(seconds["paged, B = 16"], seconds["contiguous"])
        percent = 100 * (middle - 1), (100 * (spread[0] - 1), 100 * (spread[1] - 1))
        what = f"overhead of paged attention, batch {batch}, context {context}"
        rows.append(Row(what, percent[0], "%", "20–26", READ, percent[1], WHY))
    figure = lines("Attention of one decode step", series, "context length, tokens", "median latency, µs", log_x=True)
    assumed = [f"{HEADS} heads of {HEAD_DIM}, float32; quartiles of {rounds} rounds in turns; {_backend()}."]
    return Result(rows, figure, assumed, data)


def _candidates(batch: int, context: int) -> dict[str, Callable[[], Any]]:
    """Attention on the same keys and values, contiguous and in scattered blocks of several sizes."""
    import torch
    import torch.nn.functional as F

    from minipaged.kernels.backend import kernels_for

    device, scale = _device(), HEAD_DIM**-0.5
    paged_decode = kernels_for("auto", torch.device(device)).paged_decode
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q = randn(batch, HEADS, HEAD_DIM)
    k, v = (randn(batch, HEADS, context, HEAD_DIM) for _ in range(2))
    lengths = torch.full((batch,), context, device=device)

    def paged(block_size: int) -> Callable[[], Any]:
        per_sequence = context // block_size
        tables = torch.randperm(batch * per_sequence, generator=generator).view(batch, -1).to(device)

        def in_blocks(contiguous: torch.Tensor) -> torch.Tensor:
            cache = torch.empty(batch * per_sequence, block_size, HEADS, HEAD_DIM, device=device)
            cache[tables] = contiguous.transpose(1, 2).unflatten(1, (per_sequence, block_size))
            return cache

        k_cache, v_cache = in_blocks(k), in_blocks(v)
        return torch.inference_mode()(lambda: paged_decode(q, k_cache, v_cache, tables, lengths, scale))

    def contiguous() -> Any:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale)

    sizes = [size for size in BLOCK_SIZES if size <= context]
    return {"contiguous": torch.inference_mode()(contiguous)} | {f"paged, B = {size}": paged(size) for size in sizes}


def _backend() -> str:
    import torch

    from minipaged.kernels.backend import choose

    return f"{_device()}, paged attention by {choose('auto', torch.device(_device()))[0]}"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
