"""What lab A7's functions must return: parts that can be put together in any order, and the unsplit result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import Violation

TOLERANCE = 1e-4  # relative to the largest number of a tensor
LEAST_TOKENS, MAX_SPLITS, PER_PROCESSOR = 256, 128, 4

Part = tuple[Tensor, Tensor, Tensor]  # o, m, l; or q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
    """What `attend` must return, in float64, by its definition."""
    if not len(k):
        return q.double() * 0, torch.full(q.shape[:1], -math.inf, dtype=torch.float64), q[:, 0].double() * 0
    scores = (q.double() * k.double()).sum(-1) * scale  # [L, H]
    m = scores.max(0).values
    weights = (scores - m).exp()
    return (weights[:, :, None] * v.double()).sum(0), m, weights.sum(0)


def compare(call: str, names: Sequence[str], got: object, expected: Sequence[Tensor], why: str) -> list[Tensor]:
    """``got`` must be as many tensors, of the same shapes and (nearly) the same numbers. Returns them."""
    if not isinstance(got, list) or len(got) != len(expected) or not all(isinstance(one, Tensor) for one in got):
        raise Violation(f"{call} must return {len(expected)} tensors: {', '.join(names)}", f"{call}: result")
    for name, mine, right in zip(names, got, expected, strict=True):
        if mine.shape != right.shape or not mine.is_floating_point():
            shapes = f"{mine.dtype} of shape {list(mine.shape)}, not float of {list(right.shape)}"
            raise Violation(f"{call} returned {name} as {shapes} ({why})", f"{call}: shape of {name}")
        infinite, wide = right.isinf(), mine.double()  # some narrow types cannot be compared
        off = torch.where(infinite & (wide == right), 0.0, (wide - right).abs())
        worst = off.max().item()
        if math.isnan(worst) or wide.isnan().any():
            raise Violation(f"{call}: {name} is NaN ({why})", f"{call}: NaN")
        if worst > TOLERANCE * max(1.0, right[~infinite].abs().max().item() if (~infinite).any() else 1.0):
            raise Violation(f"{call}: {name} is wrong by {worst:.3g} ({why})", f"{call}: {name}")
    return got


def a7_1(trial: Trial) -> None:
    """Few programs and many, short contexts and long ones."""
    random = trial.random
    cases = [(100_000, 32, 108), (100_000, 500, 108), (100, 1, 108), (0, 1, 1), (256, 1, 1)]
    cases += [(511, 1, 108), (512, 1, 108)]
    cases += [(1_000_000, programs, 108) for programs in (1, 217, 432, 433)]
    cases += [(random.randrange(20_000), random.randint(1, 600), random.randint(1, 150)) for _ in range(20)]
    for longest, programs, processors in cases:
        call = f"num_splits({longest}, programs={programs}, processors={processors})"
        got = trial.student.function("num_splits", longest, programs, processors)
        if type(got) is not int or not 1 <= got <= MAX_SPLITS:
            raise Violation(f"{call} returned {got!r}, which is no number from 1 to {MAX_SPLITS}", "range")
        if got > 1 and got * LEAST_TOKENS > longest:
            raise Violation(f"{call} returned {got}: splits would have fewer than {LEAST_TOKENS} tokens", "too short")
        if got > 1 and got * programs > PER_PROCESSOR * processors:
            raise Violation(
                f"{call} returned {got}: that makes {got * programs} programs, and the GPU has room for "
                f"{PER_PROCESSOR * processors}", "too many",
            )  # fmt: skip
        more = got + 1
        if more <= MAX_SPLITS and more * LEAST_TOKENS <= longest and more * programs <= PER_PROCESSOR * processors:
            raise Violation(f"{call} returned {got}, but {more} splits are possible", "too few")


def _tensors(trial: Trial, length: int, size: float = 1.0, heads: int = 2, dim: int = 4) -> Part:
    generator = torch.Generator().manual_seed(trial.random.randrange(1 << 40))
    shapes = (heads, dim), (length, heads, dim), (length, heads, dim)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q * size, k, v


def a7_2(trial: Trial) -> None:
    """One token, several, none; and scores whose exponentials no float32 holds."""
    for length, size, why in ((1, 1.0, "one token"), (7, 1.0, "7 tokens"), (5, 500.0, "scores of hundreds"),
                              (0, 1.0, "no tokens")):  # fmt: skip
        q, k, v = _tensors(trial, length, size=size)
        got = trial.student.function("attend", q.clone(), k.clone(), v.clone(), 0.5)
        compare("attend", ("o", "m", "l"), got, attend(q, k, v, 0.5), why)


class Context:
    """A context cut into parts: what each says, and what they say together."""

    def __init__(self, trial: Trial, sizes: Sequence[int], size: float) -> None:
        self.student = trial.student
        self.q, self.k, self.v = _tensors(trial, sum(sizes), size=size)
        self.parts, begin = [], 0
        for count in sizes:
            self.parts.append(self.part(begin, begin + count))
            begin += count

    def part(self, begin: int, end: int) -> Part:
        o, m, l = attend(self.q, self.k[begin:end], self.v[begin:end], 0.5)  # noqa: E741
        return (o if end > begin else o + math.nan).float(), m.float(), l.float()

    def merge(self, parts: Sequence[Part]) -> Part:
        return self.student.function("merge", *(torch.stack(column) for column in zip(*parts, strict=True)))


def _merge(trial: Trial, size: float, trace: Trace, tape: Tape) -> None:
    """``trace``: how many tokens each part has."""
    if not trace:
        return
    context = Context(trial, trace, size)
    names, right = ("o", "m", "l"), attend(context.q, context.k, context.v, 0.5)
    tape.say(f"merge of parts with {', '.join(map(str, trace))} tokens")
    whole = compare("merge", names, context.merge(context.parts), right, f"parts of {list(trace)} tokens")
    tape.say("merge of the same parts, the last one first")
    got = context.merge(context.parts[::-1])
    compare("merge", names, got, [one.double() for one in whole], f"parts of {list(trace)} tokens, the last one first")
    for cut in range(1, len(trace)):
        why = f"first parts of {list(trace[:cut])} tokens, then parts of {list(trace[cut:])}, then both results"
        tape.say(f"merge of {why}")
        halves = [context.merge(context.parts[:cut]), context.merge(context.parts[cut:])]
        for half in halves:
            compare("merge", names, half, half, why)  # shapes, and no NaN
        compare("merge", names, context.merge(halves), [one.double() for one in whole], why)


def a7_3(trial: Trial) -> None:
    """Parts with tokens, merged at once, in another order, and the merged merged."""
    sizes = [[3], [1, 1], [4, 1, 2], [trial.random.randint(1, 9) for _ in range(5)]]
    for size in (1.0, 500.0):
        trial.search(sizes, partial(_merge, trial, size))


def a7_4(trial: Trial) -> None:
    """Empty parts: first, last, in between, only. Then whole contexts, cut by `bounds`, shorter than their splits."""
    trial.search([[0, 3], [3, 0], [2, 0, 0, 3], [0]], partial(_merge, trial, 1.0))
    for length, splits in ((1, 1), (1, 3), (256, 4), (257, 4), (600, 2), (700, 5)):
        q, k, v = _tensors(trial, length)
        o, _, total = attend(q, k, v, 0.5)
        got = trial.student.function("split_attention", q, k, v, 0.5, splits)
        compare("split_attention", ("result",), [got], [o / total[:, None]], f"{length} tokens, {splits} splits")


CHECKS = {"A7.1": a7_1, "A7.2": a7_2, "A7.3": a7_3, "A7.4": a7_4}
