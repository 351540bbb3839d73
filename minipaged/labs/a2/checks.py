"""What lab A2's functions must return: what attention over the same tokens in one piece gives."""

from __future__ import annotations

import math
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from minipaged.core.plan import Chunk, StepPlan
from minipaged.events import Admitted, Allocated, EngineStarted, Filled, RequestAdded
from minipaged.kernels import reference
from minipaged.kernels.backend import Kernels
from minipaged.labs import small
from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import Violation

TOLERANCE = 1e-4  # of float32, whose order of summation is the student's affair


class Batch:
    """Sequences whose keys and values lie in blocks of a cache, and in one piece as well.

    ``dead`` fills every slot that holds no token of any sequence. Short tables are padded with other sequences' blocks.
    """

    def __init__(
        self, random: Random, lengths: list[int], heads: tuple[int, int], head_dim: int, block_size: int, dead: float
    ) -> None:
        self.lengths, self.block_size, (num_heads, kv_heads) = lengths, block_size, heads
        generator = torch.Generator().manual_seed(random.randrange(1 << 40))
        counts = [-(-length // block_size) for length in lengths]
        num_blocks, width = sum(counts) + 2, max(counts) + 1
        ids = random.sample(range(num_blocks), num_blocks)
        self.tables = [[ids.pop() for _ in range(count)] for count in counts]
        self.padded = [table + random.choices(range(num_blocks), k=width - len(table)) for table in self.tables]
        self.q = torch.randn(len(lengths), num_heads, head_dim, generator=generator)
        self.k_cache = torch.full((num_blocks, block_size, kv_heads, head_dim), dead)
        self.v_cache = self.k_cache.clone()
        self.k = [torch.randn(length, kv_heads, head_dim, generator=generator) for length in lengths]
        self.v = [torch.randn(length, kv_heads, head_dim, generator=generator) for length in lengths]
        for b, table in enumerate(self.tables):
            for position in range(lengths[b]):
                place = table[position // block_size], position % block_size
                self.k_cache[place], self.v_cache[place] = self.k[b][position], self.v[b][position]

    def expected(self, scale: float) -> Tensor:
        """[B, H, D] in float64: head after head, from the tokens in one piece."""
        num_heads, kv_heads = self.q.shape[1], self.k_cache.shape[2]
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for b, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            for h in range(num_heads):
                kv_head = h // (num_heads // kv_heads)
                weights = (scale * (k[:, kv_head].double() @ self.q[b, h].double())).softmax(0)
                out[b, h] = weights @ v[:, kv_head].double()
        return out

    def show(self, tape: Tape, call: str) -> None:
        """The block tables, for the visualizer."""
        num_blocks = len(self.k_cache)
        tape.record(EngineStarted("attention", self.block_size, num_blocks, 64, 64, 64, False, "recompute", 0, 0))
        tape.begin(call)
        for seq, (length, table) in enumerate(zip(self.lengths, self.tables, strict=True)):
            tape.say(f"  sequence {seq}: {tokens(length)} in blocks {table}")
            tape.record(RequestAdded(f"sequence-{seq}", [seq], [0] * length, ["·"] * length, 1))
            tape.record(Admitted(f"sequence-{seq}", seq, 0))
            for logical, block in enumerate(table):
                tape.record(Allocated(seq, logical, block))
            tape.record(Filled(seq, 0, length))


def tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def compare(call: str, got: object, batch: Batch, scale: float, tolerance: float = TOLERANCE) -> None:
    """``got`` must be a float tensor of q's shape, equal to the expected within ``tolerance``."""
    shape = list(batch.q.shape)
    if not isinstance(got, Tensor):
        raise Violation(f"{call} returned {type(got).__name__}, not a tensor", "no tensor")
    if list(got.shape) != shape or not got.is_floating_point():
        raise Violation(f"{call} returned {got.dtype} of shape {list(got.shape)}, not float of {shape}", "shape")
    off = (got.double() - batch.expected(scale)).abs()
    for b, length in enumerate(batch.lengths):
        for h in range(shape[1]):
            worst = off[b, h].max().item()
            where = f"{call}: sequence {b} ({tokens(length)} in blocks of {batch.block_size}), query head {h},"
            if math.isnan(worst):
                raise Violation(f"{where} is NaN", "NaN")
            if worst > tolerance:
                raise Violation(f"{where} is wrong by {worst:.3g}", "wrong result")


def _attend(trial: Trial, seed: int, settings: dict, trace: Trace, tape: Tape) -> None:
    if not trace:
        return
    scale = round(settings["head_dim"] ** -0.5, 3)
    batch = Batch(Random(seed), list(trace), **settings)
    heads = f"{settings['heads'][0]} query heads, {settings['heads'][1]} key/value heads"
    batch.show(tape, f"paged_attention with {heads}, head dimension {settings['head_dim']}")
    arguments = (batch.q, batch.k_cache, batch.v_cache, torch.tensor(batch.padded), torch.tensor(batch.lengths))
    got = trial.student.function("paged_attention", *(argument.clone() for argument in arguments), scale)
    compare("paged_attention", got, batch, scale)


def lengths_for(block_size: int) -> list[list[int]]:
    """Batches of sequence lengths: one token, around the edges of blocks, and all of these together."""
    edges = [1, block_size - 1, block_size, block_size + 1, 3 * block_size]
    some = [length for length in edges if length]
    return [[1], [2 * block_size], some]


def search(trial: Trial, shapes: list[tuple[tuple[int, int], int, int]], dead: float) -> None:
    """Batches of every (heads, head dimension, block size), with ``dead`` in dead slots."""
    for heads, head_dim, block_size in shapes:
        settings = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dead": dead}
        run = partial(_attend, trial, trial.random.randrange(1 << 40), settings)
        trial.search(lengths_for(block_size), run)


def a2_1(trial: Trial) -> None:
    """Slots of whole prompts, of later chunks, of one token, and of none."""
    for block_size in (1, 2, 4, trial.random.randrange(5, 9)):
        table = trial.random.sample(range(50), 5)
        length = 5 * block_size
        spans = [(0, length), (0, 1), (length - 1, 1), (block_size, block_size), (length // 2, length - length // 2)]
        spans += [(block_size - 1, 2), (length // 3, 0)]
        for start, count in spans:
            call = f"slot_mapping({table}, {start}, {count}, {block_size})"
            expected, block = [], table[start // block_size]
            for position in range(start, start + count):
                block = table[position // block_size]
                expected.append(block_size * block + position % block_size)
            got = trial.student.function("slot_mapping", table, start, count, block_size)
            if not isinstance(got, list) or len(got) != count:
                raise Violation(f"{call} returned {got!r}, but {count} tokens need a list of {count} slots", "length")
            for i, slot in enumerate(got):
                if slot != expected[i]:
                    position = start + i
                    where = f"the token at position {position} belongs into block {table[position // block_size]}"
                    raise Violation(f"{call} returned {got}: {where}, slot {expected[i]}, not {slot}", "slot")


def a2_2(trial: Trial) -> None:
    """As many key/value heads as query heads; dead slots hold numbers that would show."""
    search(trial, [((1, 1), 4, 4), ((3, 3), 8, trial.random.choice((3, 5)))], dead=7.0)


def a2_3(trial: Trial) -> None:
    """NaN and infinity in dead slots."""
    for dead in (math.nan, math.inf):
        search(trial, [((2, 2), 4, trial.random.choice((3, 4)))], dead)


def a2_4(trial: Trial) -> None:
    """Several query heads share a key/value head."""
    search(trial, [((4, 2), 8, 4), ((6, 2), 4, 3), ((3, 1), 4, 2)], dead=math.nan)


def a2_5(trial: Trial) -> None:
    """In the engine: what the student's functions find and compute is what it goes on with."""

    def kernels_of(tape: Tape) -> tuple[Kernels, small.Prepare]:
        slots: list[int] = []

        def prepare(plan: StepPlan) -> None:
            slots[:] = [slot for chunk in plan.chunks for slot in _slots_of(trial, chunk)]

        def rope_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
            k_cache, v_cache, *_ = rest
            return reference.rope_store(q, k, v, cos, sin, k_cache, v_cache, torch.tensor(slots))

        attend = partial(trial.student.function, "paged_attention")
        return small.checked(attend, "paged_attention", rope_store), prepare

    small.search(trial, kernels_of, [(4, 5), (1, 3), (7, 4)])


def _slots_of(trial: Trial, chunk: Chunk) -> list[int]:
    arguments = (chunk.block_table, chunk.start, chunk.num_tokens, small.BLOCK_SIZE)
    got = trial.student.function("slot_mapping", *arguments)
    right = [chunk.block_table[p // small.BLOCK_SIZE] * small.BLOCK_SIZE + p % small.BLOCK_SIZE
             for p in range(chunk.start, chunk.start + chunk.num_tokens)]  # fmt: skip
    if got != right:
        call = f"slot_mapping({', '.join(map(str, arguments))})"
        raise Violation(f"in the engine, {call} returned {got} instead of {right}", "slot")
    return right


CHECKS = {"A2.1": a2_1, "A2.2": a2_2, "A2.3": a2_3, "A2.4": a2_4, "A2.5": a2_5}
