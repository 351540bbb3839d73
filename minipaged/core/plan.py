"""The contract between deciding and executing: everything that one step does, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minipaged.core.request import Request, Sequence


class Copy(NamedTuple):
    """Block ``src`` must be copied to block ``dst``, in all layers, before the step's forward pass."""

    src: int
    dst: int


class Write(NamedTuple):
    """This step writes the KV of tokens [start, end) of a sequence."""

    seq_id: int
    start: int
    end: int


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence, computed in this step: one (a decode) or several (prefill).

    ``samples`` are the sequences that take their next token from the last row of logits: none in the middle of a
    prompt, usually the sequence itself, and where a request forks, all whose tokens end here.

    The last tokens may be a ``draft``: guesses that the sequence does not have yet, verified in this step
    (`features.speculative`). Each has a row, too, so ``samples`` has the sequence 1 + len(draft) times; the sampler
    answers ``None`` for rows after the first wrong guess. ``draft_probs``: what a draft model drew the draft from.
    """

    request: Request
    seq: Sequence
    start: int
    num_tokens: int
    samples: list[Sequence]
    block_table: list[int]
    draft: list[int] = field(default_factory=list)
    draft_probs: Any = None

    @property
    def num_rows(self) -> int:
        """Rows of logits it needs: the last one if it samples; all of them if it reports prompt log-probabilities."""
        if self.request.prompt_logprobs is not None and self.start < self.seq.num_prompt:
            return self.num_tokens
        return 1 + len(self.draft) if self.samples else 0

    @property
    def token_ids(self) -> list[int]:
        # num_tokens counts the draft too; the slice ends where the sequence's own tokens end.
        return self.seq.tokens[self.start : self.start + self.num_tokens] + self.draft


@dataclass
class StepPlan:
    """One step. Runners execute maps, swap-outs, swap-ins, copies, chunks, in this order; `Scheduler.commit` ends it.

    ``swap_outs`` and ``swap_ins`` are for `features.swap`, ``maps`` is the `PageMaps` of `features.vattention`.
    """

    step: int
    chunks: list[Chunk] = field(default_factory=list)  # one-token chunks first
    swap_outs: list[Copy] = field(default_factory=list)  # pool → swap space
    swap_ins: list[Copy] = field(default_factory=list)  # swap space → pool
    copies: list[Copy] = field(default_factory=list)  # copy-on-write
    maps: Any = None
    preempted: list[Request] = field(default_factory=list)
    outgrown: list[Request] = field(default_factory=list)  # lost a sequence: see Scheduler.outgrow

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def samples(self) -> list[tuple[Request, Sequence]]:
        """The sequences that take a token, in the order of the sampler's results."""
        return [(chunk.request, seq) for chunk in self.chunks for seq in chunk.samples]


@dataclass(slots=True)
class SampledToken:
    """The sampler's answer for one sequence. ``logprobs``: token id → log-probability, if the request asked."""

    token_id: int
    logprobs: dict[int, float] | None = None
    error: Exception | None = None  # no token could be drawn: the request ends with it, and token_id means nothing
