"""What lab A3's kernel must compute, and what it must leave alone. It runs in Triton's interpreter.

The interpreter knows no bounds: a load or store beyond a tensor goes through, as it does on a GPU. So what lies around
the tensors is filled with NaN, and around the result with numbers that must still be there afterwards.
"""

from __future__ import annotations

import math
from functools import partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipaged.labs import small
from minipaged.labs.a2.checks import Batch, compare
from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import Violation

CANARY = -777.0  # a number that float16 has, too
CALL = "paged_decode"


class Placed(NamedTuple):
    """A tensor in a larger buffer: ``torch.as_strided(buffer, *view)``."""

    buffer: Tensor
    view: tuple[list[int], list[int], int]

    def tensor(self) -> Tensor:
        return torch.as_strided(self.buffer, *self.view)


def place(tensor: Tensor, filler: float, pads: list[int], order: list[int]) -> Placed:
    """Puts a tensor where it has ``pads`` more elements before and behind it in each dimension, with dimensions in the
    given ``order`` in memory."""
    sizes = [size + 2 * pad for size, pad in zip(tensor.shape, pads, strict=True)]
    buffer = torch.full([sizes[i] for i in order], filler, dtype=tensor.dtype)
    room = buffer.permute([order.index(i) for i in range(len(order))])
    for dim, (size, pad) in enumerate(zip(tensor.shape, pads, strict=True)):
        room = room.narrow(dim, pad, size)
    room.copy_(tensor)
    return Placed(buffer.flatten(), (list(room.shape), list(room.stride()), int(room.storage_offset())))


class Layout(NamedTuple):
    """How tensors lie in memory. Dimensions with stride 1 are always the last."""

    pads: bool
    strange: bool = False  # an order of dimensions other than the usual

    def place(self, tensor: Tensor, filler: float) -> Placed:
        rank = tensor.dim()
        order = [*reversed(range(rank - 1)), rank - 1] if self.strange else list(range(rank))
        pads = [rank - dim for dim in range(rank)] if self.strange else [int(self.pads)] + [0] * (rank - 1)
        if tensor.dtype == torch.int64:  # block tables: rows of a wider tensor
            pads, order = [0, int(self.pads)], [0, 1]
        return place(tensor, filler, pads, order)


def _attend(trial: Trial, seed: int, settings: dict[str, Any], trace: Trace, tape: Tape) -> None:
    if not trace:
        return
    layout, dtype, size = settings["layout"], settings["dtype"], settings["size"]
    shape = {key: settings[key] for key in ("heads", "head_dim", "block_size", "dead")}
    batch = Batch(Random(seed), list(trace), **shape)
    batch.q *= size
    _round(batch, dtype)
    (heads, kv_heads), head_dim = shape["heads"], shape["head_dim"]
    name = str(dtype).removeprefix("torch.")
    heads_told = f"{heads} query heads, {kv_heads} key/value heads"
    batch.show(tape, f"{CALL} in {name} with {heads_told}, head dimension {head_dim}")
    tape.say(f"  {layout.place(batch.q, 0).view[1]} are the strides of q, {layout.place(batch.k_cache, 0).view[1]} k's")
    caches = [layout.place(cache.to(dtype), shape["dead"]) for cache in (batch.k_cache, batch.v_cache)]
    placed = [
        layout.place(batch.q.to(dtype), math.nan), *caches, layout.place(torch.tensor(batch.padded), 0),
        layout.place(torch.full_like(batch.q, CANARY).to(dtype), CANARY),
    ]  # fmt: skip
    buffers, views = [one.buffer.clone() for one in placed], [list(one.view) for one in placed]
    scale = head_dim**-0.5
    got = trial.student.function("run_in_buffers", buffers, views, torch.tensor(batch.lengths), scale)
    _judge(got, placed[-1], batch, scale, 1e-4 if dtype == torch.float32 else 5e-3)


def _judge(got: Any, out: Placed, batch: Batch, scale: float, tolerance: float) -> None:
    """The result where it belongs, and nothing anywhere else."""
    if not isinstance(got, Tensor) or got.shape != out.buffer.shape or got.dtype != out.buffer.dtype:
        raise Violation("run_in_buffers, which is given, must return the whole buffer of out", "buffer")
    result = Placed(got, out.view).tensor()
    compare(CALL, result.float(), batch, scale, tolerance)
    around = got.clone()
    Placed(around, out.view).tensor().fill_(CANARY)
    spoilt = int((around != CANARY).sum())
    if spoilt:
        raise Violation(f"{CALL} wrote to {spoilt} numbers that lie around out, and belong to others", "canary")


def _round(batch: Batch, dtype: torch.dtype) -> None:
    """The numbers as they are after a conversion, in float32: what is expected is computed from them."""
    batch.q = batch.q.to(dtype).float()
    for tensors in (batch.k, batch.v):
        tensors[:] = [tensor.to(dtype).float() for tensor in tensors]


def search(trial: Trial, lengths: list[int], **settings: Any) -> None:
    defaults = {"dead": 7.0, "layout": Layout(pads=False), "dtype": torch.float32, "size": 1.0}
    run = partial(_attend, trial, trial.random.randrange(1 << 40), defaults | settings)
    trial.search([lengths], run)


def a3_1(trial: Trial) -> None:
    """Sizes that are powers of two; one token, a full block, several; scores whose exponentials no float32 holds."""
    search(trial, [1, 4, 10], heads=(2, 2), head_dim=4, block_size=4)
    search(trial, [6], heads=(1, 1), head_dim=8, block_size=2, size=300.0)


def a3_2(trial: Trial) -> None:
    """Any sizes; NaN in dead slots and around all tensors; canaries around the result."""
    for dead in (math.nan, math.inf):
        size = trial.random.choice((3, 5))
        search(trial, [1, size, size + 1], heads=(2, 2), head_dim=3, block_size=size, dead=dead, layout=Layout(True))


def a3_3(trial: Trial) -> None:
    """Several query heads share a key/value head."""
    search(trial, [2, 4], heads=(4, 2), head_dim=6, block_size=3, dead=math.nan, layout=Layout(True))


def a3_4(trial: Trial) -> None:
    """Tensors that are parts of others, in float32 and float16. (The interpreter cannot do bfloat16.)"""
    for dtype in (torch.float32, torch.float16):
        settings = {"head_dim": 5, "block_size": 4, "dead": math.nan, "layout": Layout(pads=True, strange=True)}
        search(trial, [3, 5], heads=(4, 2), dtype=dtype, **settings)


def a3_5(trial: Trial) -> None:
    """In the engine, whose text must stay the same."""
    usual = Layout(pads=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lens: Tensor, scale: float) -> Tensor:
        placed = [usual.place(tensor, 0) for tensor in (q, k, v, tables, torch.full_like(q, CANARY))]
        buffers, views = [one.buffer for one in placed], [list(one.view) for one in placed]
        got = trial.student.function("run_in_buffers", buffers, views, lens, scale)
        return got.reshape(q.shape) if isinstance(got, Tensor) and got.shape == buffers[-1].shape else got

    kernels = small.checked(attend, CALL)
    small.search(trial, lambda tape: (kernels, lambda plan: None), [(2, 3), (4, 3)])


CHECKS = {"A3.1": a3_1, "A3.2": a3_2, "A3.3": a3_3, "A3.4": a3_4, "A3.5": a3_5}
