"""Requests and their sequences: plain data that the scheduler moves between its queues."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from minipaged.core.params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One stream of tokens. One counter drives everything, ``num_computed``: the tokens whose KV is in the KV cache.

    A sequence needs a step while ``num_computed < len(tokens)``. Prefill, decode, a prefix cache hit and recomputation
    after preemption run the same code; only the distance between the two numbers differs.
    """

    seq_id: int
    tokens: list[int]  # prompt, then output
    num_prompt: int
    rng: Random  # its own, so that its random numbers depend on neither the batch nor preemption
    num_computed: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)  # one per output token, if asked for
    cumulative_logprob: float = 0.0
    text: Any = None  # a text.TextStream where there is a tokenizer: tokens in, readable text out

    def copy(self, seq_id: int, rng: Random | None = None) -> Sequence:
        """For features that fork; they fork its block table, too. Beams need no ``rng``: they draw no numbers."""
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


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"  # kept by a feature (features.swap); core alone never does that
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """What the user asked for: one prompt and ``params.n`` sequences.

    It is a *sequence group* of the PagedAttention paper (Kwon et al., 2023, §4.5; "the paper" everywhere here): all its
    sequences exist from arrival and are admitted, preempted and resumed together. Up to ``fork_at``, the tokens that
    they share, only the first one, the *lead*, has a block table; `Scheduler.commit` then forks it for the others.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seqs: list[Sequence]
    stop_token_ids: frozenset[int]  # the model's end-of-text tokens (unless ignored) and the request's own
    max_output: int  # tokens that a sequence may generate
    arrival: int  # a counter: the order of arrival
    decoding: Any  # a seams.Decoding: how its sequences take tokens (sampling, or beam search)
    rank: float = 0  # queues are in the order of (rank, arrival); the admission policy sets it
    prompt: str | None = None
    fork_at: int = 0  # tokens that all live sequences share: the prompt, and after each preemption what still agrees
    status: Status = Status.WAITING
    prompt_logprobs: list[dict[int, float] | None] | None = None  # one per prompt token, if asked for
    error: Exception | None = None  # what ended it, if it failed
    live: list[Sequence] = field(init=False)  # the sequences that have not finished

    def __post_init__(self) -> None:
        self.set_seqs(self.seqs)

    def set_seqs(self, seqs: list[Sequence]) -> None:
        """Replaces the sequences: the beams of a search change with every token."""
        self.seqs, self.live = seqs, [seq for seq in seqs if seq.finish_reason is None]

    def end(self, seq: Sequence, reason: str) -> None:
        """Marks one of its sequences, or a beam that the search dropped, as finished."""
        seq.finish_reason = reason
        if seq in self.live:
            self.live.remove(seq)

    @property
    def width(self) -> int:
        """Sequences that it may have running: what `max_num_seqs` counts."""
        return int(self.decoding.width(self))


def common_prefix(seqs: list[Sequence]) -> int:
    """The number of tokens that all of the sequences start with."""
    first = seqs[0].tokens
    length = min(len(seq.tokens) for seq in seqs)
    for seq in seqs[1:]:
        length = next((i for i in range(length) if seq.tokens[i] != first[i]), length)
    return length
