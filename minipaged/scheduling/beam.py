"""Beam search as bookkeeping: which continuations live on. Their KV is shared and copied like any fork's.

Beams of one request share most of their blocks, and who shares what changes with every token (paper §4.4, Fig. 9).
Nothing here knows that: a beam with two good continuations is forked, one with none is freed, and copy-on-write does
the rest. Chooses and scores as transformers does, so that results can be compared token for token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from minipaged.config import SamplingParams
from minipaged.request import Sequence
from minipaged.scheduling.plan import SampledToken


class Continuation(NamedTuple):
    """``parent`` continued by one token; ``score`` is the sum of all its log-probabilities."""

    score: float
    parent: Sequence
    token: SampledToken
    ends: str | None = None  # finish reason, if the token ends it


@dataclass
class BeamSearch:
    """The state of one request's search.

    ``finished`` holds up to ``beam_width`` hypotheses as (score / length ** length_penalty, sequence), best first.
    """

    params: SamplingParams
    stop_token_ids: frozenset[int]  # of the model and of the request together
    finished: list[tuple[float, Sequence]] = field(default_factory=list)
    improvable: bool = True
    done: bool = False

    @property
    def width(self) -> int:
        assert self.params.beam_width is not None
        return self.params.beam_width

    @property
    def candidates_per_beam(self) -> int:
        """Enough that ``width`` unfinished ones remain even if every stop token is among them."""
        return self.width * max(2, 1 + len(self.stop_token_ids))

    def choose(
        self, rows: list[tuple[Sequence, SampledToken]], max_output: int
    ) -> tuple[list[Continuation], list[Continuation]]:
        """(continuations that live on, continuations that end well enough to be kept), each best first.

        ``rows`` are the live beams with their likeliest next tokens; all have the same length.
        """
        length = rows[0][0].num_output + 1
        everything = [
            Continuation(seq.cumulative_logprob + logprob, seq, SampledToken(token, row.logprobs))
            for seq, row in rows
            for token, logprob in (row.logprobs or {}).items()
        ]
        everything.sort(key=lambda c: -c.score)  # stable: of equals, the earlier beam first
        best = [
            c._replace(ends=self._end_of(c.token.token_id, length >= max_output))
            for c in everything[: self.candidates_per_beam]
        ]
        live = [c for c in best if c.ends is None][: self.width]
        # Only what ranks among the best `width` may end; the rest were there to keep enough beams alive.
        ended = [c for c in best[: self.width] if c.ends] if self._accepts() else []
        return live, ended

    def add(self, score: float, seq: Sequence) -> None:
        """Keeps a finished hypothesis if it is among the best ``width``."""
        self.finished.append((self._normalized(score, seq.num_output), seq))
        self.finished.sort(key=lambda hypothesis: -hypothesis[0])
        del self.finished[self.width :]

    def update_done(self, live: list[Continuation], length: int, max_output: int) -> None:
        """Ends the search when no live beam can beat the worst finished one, or none is left.

        ``early_stopping``: True ends it with ``width`` hypotheses; False guesses that the best live score per token
        will not improve; "never" allows for the best that could still come (transformers' definitions).
        """
        full = len(self.finished) == self.width
        if live and full:
            hopeful = self.params.early_stopping == "never" and self.params.length_penalty > 0
            best = self._normalized(live[0].score, max_output if hopeful else length)
            self.improvable = self.improvable and best > self.finished[-1][0]
        self.done = not live or not self.improvable or (full and self.params.early_stopping is True)

    def _accepts(self) -> bool:
        full = len(self.finished) == self.width
        return self.improvable and not (full and self.params.early_stopping is True)

    def _end_of(self, token_id: int, at_limit: bool) -> str | None:
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if at_limit else None

    def _normalized(self, score: float, length: int) -> float:
        return score / max(length, 1) ** self.params.length_penalty  # 0 when aborted before its first token
