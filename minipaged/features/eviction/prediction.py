"""Predictors of one bit per request: 1 if its blocks will not be needed again in time, 0 if they will.

A *discard* bit is right if it says whether Belady's algorithm evicts the page before its next request. A *phase* bit is
right if it says whether the page is missing from the next phase, a longest run of requests for k different pages. With
all requests known, both can be computed (`discard_bits`, `phase_bits`), and errors can be added (`flipped`). In a chat
the future is unknown: `LastTurn` guesses.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from math import inf
from random import Random
from typing import Any

from minipaged.errors import InvalidConfig

Predictor = Callable[[Seq[int]], bool]  # the tokens of a prompt → the bit of its blocks

CLOSING = re.compile(r"\b(thanks|thank you|thx|bye|goodbye|good night|that is all|that's all)\b", re.IGNORECASE)
TAIL = 20  # tokens at a prompt's end: the user's last words and what the chat template appends to them


class LastTurn:
    """Predicts whether a prompt is the last turn of its conversation; learns from the conversations it sees.

    A prompt that begins with an earlier prompt is the next turn of that conversation. An earlier prompt that is not
    continued while ``patience`` other prompts come was a last turn. The predictor counts, by number of turns (8 and
    more are one) and with or without closing words, how many conversations went on and how many ended, and predicts the
    majority. Without data it predicts the end after closing words, and a next turn otherwise.

    Args:
        closing: tells from a prompt's tokens whether the user has said goodbye (see `closing_words`). ``None``: never.
        patience: how many later requests to wait for a next turn.
    """

    def __init__(self, closing: Callable[[Seq[int]], bool] | None = None, patience: int = 256) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise InvalidConfig(f"patience must be a whole number of at least 1, not {patience!r}")
        self._closing, self._patience = closing, patience
        self._open: dict[int, tuple[int, bool, int]] = {}  # hash of a prompt → (turn, closing, when), oldest first
        self._ended: dict[tuple[int, bool], int] = {}
        self._continued: dict[tuple[int, bool], int] = {}
        self._now = 0

    def __call__(self, tokens: Seq[int]) -> bool:
        name, earlier = 0, None
        for position, token in enumerate(tokens, start=1):
            name = hash((name, token))
            if name in self._open and position < len(tokens):
                earlier = name
        if name not in self._open:  # else the same prompt again: another sample, or it was preempted
            self._remember(name, earlier, tokens)
        turn, closing, _ = self._open[name]
        return self.expects_end(turn, closing)

    def expects_end(self, turn: int, closing: bool) -> bool:
        """The prediction for a prompt with these features: whether its conversation ends."""
        ended, continued = (counts.get((turn, closing), 0) for counts in (self._ended, self._continued))
        return ended + closing > continued + (not closing)

    def _remember(self, name: int, earlier: int | None, tokens: Seq[int]) -> None:
        turn = 1
        if earlier is not None:
            last_turn, closing, _ = self._open.pop(earlier)
            self._count(self._continued, last_turn, closing)
            turn = min(8, last_turn + 1)
        self._open[name] = turn, bool(self._closing and self._closing(tokens)), self._now
        self._now += 1
        while True:
            oldest = next(iter(self._open))
            turn, closing, when = self._open[oldest]
            if self._now - when <= self._patience:
                return
            del self._open[oldest]
            self._count(self._ended, turn, closing)

    def _count(self, counts: dict[tuple[int, bool], int], turn: int, closing: bool) -> None:
        counts[turn, closing] = counts.get((turn, closing), 0) + 1


def closing_words(tokenizer: Any) -> Callable[[Seq[int]], bool]:
    """Makes a function from a Hugging Face tokenizer: does a prompt end with English words of thanks or goodbye?"""
    return lambda tokens: bool(CLOSING.search(tokenizer.decode(list(tokens[-TAIL:]))))


class Given:
    """A predictor with given bits, one for each request, in order. Asking for more raises `IndexError`."""

    def __init__(self, bits: Seq[bool]) -> None:
        self._bits, self._asked = bits, 0

    def __call__(self, tokens: Seq[int]) -> bool:
        self._asked += 1
        return self._bits[self._asked - 1]


def discard_bits(requests: Seq[Hashable], k: int) -> list[bool]:
    """For each request whether Belady's algorithm, with room for k pages, evicts its page before its next request."""
    uses: dict[Hashable, list[int]] = {}
    for number, page in enumerate(requests):
        uses.setdefault(page, []).append(number)
    bits, latest = [False] * len(requests), dict[Hashable, int]()  # page in the cache → its latest request
    for number, page in enumerate(requests):
        if page not in latest and len(latest) == k:
            victim = max(latest, key=lambda held: (_after(uses[held], number), -latest[held]))
            bits[latest.pop(victim)] = True
        latest[page] = number
    return bits


def phase_bits(requests: Seq[Hashable], k: int) -> list[bool]:
    """For each request whether its page is *not* requested in the phase after this one."""
    phases: list[set[Hashable]] = [set()]
    of_request = []
    for page in requests:
        if page not in phases[-1] and len(phases[-1]) == k:
            phases.append(set())
        phases[-1].add(page)
        of_request.append(len(phases))  # the number of the next phase
    phases.append(set())
    return [page not in phases[phase] for page, phase in zip(requests, of_request, strict=True)]


def flipped(bits: Seq[bool], zeros: float, ones: float, seed: int = 0) -> list[bool]:
    """Adds random errors: flips the fraction ``zeros`` of the 0s and the fraction ``ones`` of the 1s."""
    random = Random(seed)
    return [bit != (random.random() < (ones if bit else zeros)) for bit in bits]


def _after(uses: list[int], number: int) -> float:
    index = bisect_right(uses, number)
    return uses[index] if index < len(uses) else inf
