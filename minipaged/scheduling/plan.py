"""The contract between deciding and executing: everything one step does, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minipaged.memory.managers.virtual import PageMaps
from minipaged.memory.table import Copy
from minipaged.request import Request, Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence, computed in this step: a decode (1) or part of a prompt.

    ``samples`` are the sequences that take their next token from the last row of logits: none in the middle of a
    prompt, usually the sequence itself, and all n of a request whose common prompt ends here.

    The last of the tokens may be a ``draft``, which the sequence does not have yet (see `scheduling.speculative`). Then
    it samples from as many rows more. ``draft_probs``: the distributions that a draft model drew it from.
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
        return self.seq.tokens[self.start : self.start + self.num_tokens] + self.draft


@dataclass
class StepPlan:
    """One step. The runner executes maps, swap-outs, swap-ins, copies, chunks, in this order; commit applies it all."""

    step: int
    chunks: list[Chunk] = field(default_factory=list)  # decodes first
    swap_outs: list[Copy] = field(default_factory=list)  # pool → swap space
    swap_ins: list[Copy] = field(default_factory=list)  # swap space → pool
    copies: list[Copy] = field(default_factory=list)
    maps: PageMaps | None = None  # only under vAttention; before everything else
    preempted: list[Request] = field(default_factory=list)
    outgrown: list[Request] = field(default_factory=list)  # lost a sequence: not even the whole pool could hold it

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def samples(self) -> list[tuple[Request, Sequence]]:
        """Who takes a token, in the order of the sampler's results."""
        return [(chunk.request, seq) for chunk in self.chunks for seq in chunk.samples]


@dataclass(slots=True)
class SampledToken:
    """The sampler's answer for one sequence. ``logprobs``: token id → log-probability, if the request asked."""

    token_id: int
    logprobs: dict[int, float] | None = None
