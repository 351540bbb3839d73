"""Prompt and output lengths: random generators, fitted to the means of real data sets.

The PagedAttention paper samples from ShareGPT (mean prompt 161.31 tokens, mean output 337.99) and Alpaca (19.31 and
58.45); these means are from a secondary source. The public ShareGPT file does not reproduce them (what was filtered is
not published), so the generators are *like* the data sets: log-normal lengths, drawn independently, with the parameters
fitted to those means. They do not model the correlation between the lengths of a prompt and its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

MAX_TOTAL = 2048  # tokens OPT can hold; longer requests are drawn again
Lengths = Iterator[tuple[int, int]]  # (prompt tokens, output tokens), without end


def sharegpt_like(seed: int) -> Lengths:
    """Chats with long answers: prompts LogN(4.605, 1.2) on [4, 1024], outputs LogN(5.527, 0.85) on [4, 2048]."""
    return _pairs(f"sharegpt/{seed}", _lognormal(4.605, 1.2, 4, 1024), _lognormal(5.527, 0.85, 4, 2048))


def alpaca_like(seed: int) -> Lengths:
    """Short instructions: prompts LogN(2.687, 0.71) on [4, 1024], outputs LogN(3.747, 0.80) on [4, 2048]."""
    return _pairs(f"alpaca/{seed}", _lognormal(2.687, 0.71, 4, 1024), _lognormal(3.747, 0.80, 4, 2048))


def translation_like(seed: int) -> Lengths:
    """Single sentences and their translations, both LogN(3.25, 0.5) on [4, 256]: about 29 tokens on average.

    The paper translates WMT16 English-German sentences (§6.4) and gives no lengths; these are an assumption.
    """
    return _pairs(f"translation/{seed}", _lognormal(3.25, 0.5, 4, 256), _lognormal(3.25, 0.5, 4, 256))


def _pairs(seed: str, prompt: Callable[[Random], int], output: Callable[[Random], int]) -> Lengths:
    rng = Random(seed)
    while True:
        pair = prompt(rng), output(rng)
        if sum(pair) <= MAX_TOTAL:
            yield pair


def _lognormal(mu: float, sigma: float, low: int, high: int) -> Callable[[Random], int]:
    """Makes a function that draws whole numbers from ``low`` to ``high``; others are drawn again, not clipped."""

    def draw(rng: Random) -> int:
        while True:
            length = round(rng.lognormvariate(mu, sigma))
            if low <= length <= high:
                return length

    return draw
