"""Predictors of one bit per request: 1, its blocks will not be needed again in time; 0, they will.

A *discard* bit is right if it says whether Belady's algorithm evicts the page before its next request, a *phase* bit if
it says whether the page is missing from the next phase, a longest run of requests for k different pages. Both can be
computed when all requests are known (`discard_bits`, `phase_bits`), and then be made wrong on purpose (`flipped`). In a
chat nobody knows the future: `LastTurn` guesses.
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
TAIL = 20  # tokens at a prompt's end that hold the user's last words, with what the chat template puts behind them


class LastTurn:
    """Is this prompt the last turn of its conversation? Learns from the conversations it sees.

    A prompt that begins with an earlier prompt is the next turn of that conversation. An earlier prompt that nobody has
    continued while ``patience`` others came was a last turn. So it counts, for each number of turns (8 and more are
    one) and with and without closing words, how many went on and how many ended, and answers with the majority. At
    first it believes that who says goodbye goes, and who does not comes back.

    Args:
        closing: tells from a prompt's tokens whether the user has said goodbye (see `closing_words`). ``None``: never.
        patience: how many later requests an answer is waited for.
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
        if name not in self._open:  # else the same prompt once more: another sample, or it had been preempted
            self._remember(name, earlier, tokens)
        turn, closing, _ = self._open[name]
        return self.expects_end(turn, closing)

    def expects_end(self, turn: int, closing: bool) -> bool:
        """What it would say now of such a prompt."""
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
    """Whether a prompt ends with English words of thanks or goodbye, by a Hugging Face tokenizer."""
    return lambda tokens: bool(CLOSING.search(tokenizer.decode(list(tokens[-TAIL:]))))


class Given:
    """Bits that are known beforehand, one for each request, in order. Asking for more raises `IndexError`."""

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
    """Makes errors: of the 0s this part (from 0 to 1) become 1, of the 1s that part becomes 0, drawn at random."""
    random = Random(seed)
    return [bit != (random.random() < (ones if bit else zeros)) for bit in bits]


def _after(uses: list[int], number: int) -> float:
    index = bisect_right(uses, number)
    return uses[index] if index < len(uses) else inf
