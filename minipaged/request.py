"""Requests and their sequences: plain data that the scheduler moves about."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from minipaged.config import SamplingParams
from minipaged.outputs import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from minipaged.scheduling.beam import BeamSearch


@dataclass(eq=False)
class Sequence:
    """One stream of tokens. The one counter that drives everything is ``num_computed``: tokens whose KV is cached.

    A sequence wants a step while ``num_computed < len(tokens)``. Prefill, decode, a prefix hit and recomputation after
    preemption differ only in how far the two are apart.
    """

    seq_id: int
    tokens: list[int]  # prompt, then output
    num_prompt: int
    rng: Random  # its own, so that results depend on neither batch neighbours nor preemption
    num_computed: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)  # one per output token, if asked for
    cumulative_logprob: float = 0.0
    text: Any = None  # text.TextStream where there is a tokenizer; tokens in, readable text out

    def copy(self, seq_id: int, rng: Random | None = None) -> Sequence:
        """The same so far, under another id. It owns no blocks yet."""
        text = self.text.fork() if self.text is not None else None
        return replace(
            self, seq_id=seq_id, tokens=list(self.tokens), logprobs=list(self.logprobs), text=text, rng=rng or self.rng
        )

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def output(self, index: int, with_logprobs: bool) -> CompletionOutput:
        """The sequence as it is now."""
        return CompletionOutput(
            index,
            self.text.text if self.text is not None else "",
            self.tokens,
            list(self.logprobs) if with_logprobs else None,
            self.cumulative_logprob if with_logprobs else None,
            self.finish_reason,
            start=self.num_prompt,
        )


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """What the user asked for: one prompt and ``params.n`` sequences (the paper's *sequence group*, §4.5).

    The sequences are admitted, preempted and resumed together. While they still agree on every token, only the first,
    the *lead*, computes; `Scheduler.commit` forks the others from it.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seqs: list[Sequence]
    stop_token_ids: frozenset[int]  # the model's end-of-text tokens (unless ignored) and the request's own
    max_output: int  # tokens a sequence may generate
    arrival: int
    prompt: str | None = None
    beams: BeamSearch | None = None
    fork_at: int = 0  # tokens that all live sequences agree on, set when the request is admitted
    status: Status = Status.WAITING
    prompt_logprobs: list[dict[int, float] | None] | None = None  # one per prompt token, if asked for
    live: list[Sequence] = field(init=False)  # the sequences that are not finished

    def __post_init__(self) -> None:
        self.set_seqs(self.seqs)

    def set_seqs(self, seqs: list[Sequence]) -> None:
        """Other sequences from now on: a beam search's, whose members change with every token."""
        self.seqs, self.live = seqs, [seq for seq in seqs if seq.finish_reason is None]

    def end(self, seq: Sequence, reason: str) -> None:
        """One of its sequences, or a beam that it has given up, is finished."""
        seq.finish_reason = reason
        if seq in self.live:
            self.live.remove(seq)

    @property
    def width(self) -> int:
        """How many sequences it may have running: what `max_num_seqs` counts."""
        return self.beams.width if self.beams and self.live else len(self.live)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens the sampler reports; ``None``: no log-probabilities at all."""
        if self.beams:
            return max(self.beams.candidates_per_beam, self.params.logprobs or 0)
        return self.params.logprobs

    def output(self) -> RequestOutput:
        """What the caller gets: the request as it is now."""
        finished = not self.live
        seqs = self.seqs if finished or not self.beams else []
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            [seq.output(index, self.params.logprobs is not None) for index, seq in enumerate(seqs)],
            finished,
            list(self.prompt_logprobs) if self.prompt_logprobs is not None else None,
        )
