"""Beam search: chooses which continuations live; forks and copy-on-write share and copy their KV.

Beams of one request share most of their blocks, and which ones they share changes with every token (PagedAttention
paper, §4.4, Fig. 9). This file does not handle sharing: it forks a beam with two good continuations and frees one with
none; copy-on-write does the rest. Chooses and scores as transformers does, to allow comparison token by token.

Adds ``SamplingParams.beam_width``, ``length_penalty`` and ``early_stopping``. It is a `core.seams.Decoding`, and uses
the scheduler's `take` and `finish`. Read `BeamSearch.advance` first. The page shows it in the scenario "Beam search".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from minipaged.core.params import SamplingParams
from minipaged.core.plan import SampledToken
from minipaged.core.request import Request, Sequence
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import Decoding, Sampling
from minipaged.events import EngineError, Finished, Forked


def decoding_of(params: SamplingParams, stop_token_ids: frozenset[int]) -> Decoding:
    """A `BeamSearch` if the parameters ask for one, else plain `Sampling`."""
    return BeamSearch(params, stop_token_ids) if params.beam_width else Sampling(params, stop_token_ids)


class Continuation(NamedTuple):
    """``parent`` continued by one token; ``score`` is the sum of all its log-probabilities."""

    score: float
    parent: Sequence
    token: SampledToken
    ends: str | None = None  # finish reason, if the token ends it


@dataclass
class BeamSearch:
    """The state of one request's beam search.

    ``finished`` holds up to ``beam_width`` hypotheses as (score / length ** length_penalty, sequence), best first.
    """

    params: SamplingParams
    stop_token_ids: frozenset[int]  # of the model and of the request together
    finished: list[tuple[float, Sequence]] = field(default_factory=list)
    improvable: bool = True
    done: bool = False
    streams = 1  # it draws no random numbers, and starts as one sequence
    independent = False

    @property
    def beam_width(self) -> int:
        assert self.params.beam_width is not None
        return self.params.beam_width

    def __post_init__(self) -> None:
        self.num_logprobs: int | None = max(self.candidates_per_beam, self.params.logprobs or 0)

    # --- as the scheduler sees it -----------------------------------------------------------------------------

    def width(self, request: Request) -> int:
        return self.beam_width if request.live else 0

    def target(self, request: Request, seq: Sequence) -> int:
        """Number of tokens to compute: beams compete for the next token, so all must reach it in the same step."""
        live = request.live
        if len(live) > 1 and any(s.num_computed < len(s.tokens) - 1 for s in live):
            return len(seq.tokens) - 1
        return len(seq.tokens)

    def advance(self, request: Request, rows: list[tuple[Sequence, SampledToken]], scheduler: Scheduler) -> None:
        """Takes one token for every beam: forks good beams, frees pruned ones and keeps finished hypotheses."""
        for error in (token.error for _, token in rows if token.error):
            scheduler.events.emit(EngineError, f"{request.request_id} failed: {error}")
            request.error = error
            return self.end(request, list(request.live), "error", scheduler)
        length = rows[0][0].num_output + 1
        live, ended = self.choose(rows, request.max_output)
        for c in ended:
            self.add(c.score, self._continue(request, c, scheduler))
        heirs = Counter(c.parent.seq_id for c in live)
        beams = []
        for c in live:
            heirs[c.parent.seq_id] -= 1
            # All but a parent's last continuation are forks; the last one continues the parent in place.
            beams.append(self._continue(request, c, scheduler, in_place=heirs[c.parent.seq_id] == 0))
        request.set_seqs(beams)
        for seq, _ in rows:
            if seq.seq_id not in heirs:
                scheduler.finish(request, seq, "pruned")
        self.update_done(live, length, request.max_output)
        if self.done:
            self._end(request, None, scheduler)

    def end(self, request: Request, seqs: list[Sequence], reason: str, scheduler: Scheduler) -> None:
        """Ends the whole search, because a single beam is no answer."""
        if request.live:
            self._end(request, reason, scheduler)

    def _end(self, request: Request, reason: str | None, scheduler: Scheduler) -> None:
        """Keeps the best n hypotheses. With a reason the search was cut short, and live beams are hypotheses too."""
        for seq in list(request.live):
            if reason:
                self.add(seq.cumulative_logprob, seq)
            scheduler.finish(request, seq, reason or "pruned")
        request.set_seqs([seq for _, seq in self.finished[: request.params.n]])

    def _continue(self, request: Request, c: Continuation, scheduler: Scheduler, in_place: bool = False) -> Sequence:
        """Appends the token to the parent or to a fork of it, and returns that; an ending fork gets no blocks."""
        seq = c.parent
        if not in_place:
            seq = c.parent.copy(scheduler.next_seq_id())
            scheduler.events.emit(Forked, c.parent.seq_id, seq.seq_id, request.request_id)
            if not c.ends:
                scheduler.memory.fork(c.parent.seq_id, seq.seq_id)
        scheduler.take(request, seq, c.token, c.ends)
        if c.ends:
            seq.finish_reason = c.ends
            scheduler.events.emit(Finished, seq.seq_id, c.ends)
        return seq

    # --- choosing ---------------------------------------------------------------------------------------------

    @property
    def candidates_per_beam(self) -> int:
        """Enough candidates to keep ``beam_width`` unfinished ones even if every stop token is among them."""
        return self.beam_width * max(2, 1 + len(self.stop_token_ids))

    def choose(
        self, rows: list[tuple[Sequence, SampledToken]], max_output: int
    ) -> tuple[list[Continuation], list[Continuation]]:
        """(live continuations, ending continuations that rank high enough to be kept), each best first.

        ``rows`` are the live beams with their likeliest next tokens; all have the same length.
        """
        length = rows[0][0].num_output + 1
        everything = [
            Continuation(seq.cumulative_logprob + logprob, seq, SampledToken(token, row.logprobs))
            for seq, row in rows
            for token, logprob in (row.logprobs or {}).items()
        ]
        everything.sort(key=lambda c: -c.score)  # stable: among equal scores, the earlier beam comes first
        best = [
            c._replace(ends=self._end_of(c.token.token_id, length >= max_output))
            for c in everything[: self.candidates_per_beam]
        ]
        live = [c for c in best if c.ends is None][: self.beam_width]
        # Only the best `beam_width` candidates may end; the others are there to keep enough beams alive.
        ended = [c for c in best[: self.beam_width] if c.ends] if self._accepts() else []
        return live, ended

    def add(self, score: float, seq: Sequence) -> None:
        """Keeps a finished hypothesis if it is among the best ``beam_width``."""
        self.finished.append((self._normalized(score, seq.num_output), seq))
        self.finished.sort(key=lambda hypothesis: -hypothesis[0])
        del self.finished[self.beam_width :]

    def update_done(self, live: list[Continuation], length: int, max_output: int) -> None:
        """Ends the search when no live beam can beat the worst finished one, or none is left.

        ``early_stopping``: True ends it with ``beam_width`` hypotheses; False assumes that the best live score per
        token will not improve; "never" compares with the best score that is still possible (transformers' definitions).
        """
        full = len(self.finished) == self.beam_width
        if live and full:
            hopeful = self.params.early_stopping == "never" and self.params.length_penalty > 0
            best = self._normalized(live[0].score, max_output if hopeful else length)
            self.improvable = self.improvable and best > self.finished[-1][0]
        self.done = not live or not self.improvable or (full and self.params.early_stopping is True)

    def _accepts(self) -> bool:
        full = len(self.finished) == self.beam_width
        return self.improvable and not (full and self.params.early_stopping is True)

    def _end_of(self, token_id: int, at_limit: bool) -> str | None:
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if at_limit else None

    def _normalized(self, score: float, length: int) -> float:
        return score / max(length, 1) ** self.params.length_penalty  # 0 when aborted before its first token
