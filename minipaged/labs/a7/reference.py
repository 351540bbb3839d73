"""Lab A7: one long context, attended to in parts.

You write the functions that raise NotImplementedError. README.md, beside this file, says what they must do.

Letters used in shapes:

    H  query heads (as many key/value heads)      D  head dimension
    L  tokens of the context, or of a part        P  parts
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_PROCESSOR = 4  # programs that a multiprocessor switches between, while others wait for memory
LEAST_TOKENS = 256  # of a split: its result has to be written and read again
MAX_SPLITS = 128


# lab: A7.1
def num_splits(longest: int, programs: int, processors: int) -> int:
    """Into how many splits contexts are cut whose longest has ``longest`` tokens: 1 … MAX_SPLITS.

    ``programs`` are there without any splitting: sequences · heads. ``processors``: multiprocessors of the GPU.
    """
    wanted = PER_PROCESSOR * processors // programs
    return max(1, min(wanted, longest // LEAST_TOKENS, MAX_SPLITS))


def bounds(length: int, splits: int) -> list[tuple[int, int]]:
    """Where the splits of a context of ``length`` tokens begin and end. All have LEAST_TOKENS tokens or more, so that
    for a short context the last ones are empty: begin = end = length. (The CPU chooses ``splits`` once for a whole
    batch, by its longest context.)"""
    size = max(-(-length // splits), LEAST_TOKENS)
    return [(min(i * size, length), min((i + 1) * size, length)) for i in range(splits)]


# lab: A7.2
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What one split says. q: [H, D]; k, v: [L, H, D], L may be 0.

    Returns o [H, D], the sum of exp(score − m) · v; m [H], the largest score; l [H], the sum of exp(score − m).
    Without tokens: zeros, minus infinity, zeros.
    """
    if len(k) == 0:
        return torch.zeros_like(q), torch.full_like(q[:, 0], -torch.inf), torch.zeros_like(q[:, 0])
    scores = torch.einsum("hd,lhd->hl", q, k) * scale
    m = scores.amax(dim=1)
    weights = torch.exp(scores - m[:, None])
    return torch.einsum("hl,lhd->hd", weights, v), m, weights.sum(dim=1)


# lab: A7.3, A7.4
def merge(o: Tensor, m: Tensor, l: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """What several parts say together, as if they were one. o: [P, H, D]; m, l: [P, H]; P is 1 or more.

    Parts without tokens have l = 0 and m = minus infinity, and anything in o. Returns o [H, D], m [H], l [H].
    """
    peak = m.amax(dim=0)
    some = l > 0  # of an empty part, nothing may be used: not its o, which nobody wrote, nor -inf - -inf
    shrink = torch.exp(m - peak).where(some, 0.0)
    parts = (o * shrink[:, :, None]).where(some[:, :, None], 0.0)
    return parts.sum(dim=0), peak, (l * shrink).sum(dim=0)


def split_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    """Attention of one query, split by split. q: [H, D]; k, v: [L, H, D], L is 1 or more. Returns [H, D]."""
    parts = [attend(q, k[begin:end], v[begin:end], scale) for begin, end in bounds(len(k), splits)]
    o, _, total = merge(*(torch.stack(column) for column in zip(*parts, strict=True)))
    return o / total[:, None]
