"""The runner's side of speculation with a draft model: it drafts tokens that the larger model then verifies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minipaged.core.plan import Chunk, StepPlan
from minipaged.execution.runner import WrappedRunner
from minipaged.execution.sampler import NOTHING
from minipaged.features.full_sampler import adjust, distribution, sample


class DraftRunner(WrappedRunner):
    """Lets a draft model write the drafts of a plan before the model computes it.

    The draft model has its own KV tensors and no block tables: its keys and values use the same blocks and slots. It
    computes every token that the model computes, so forks, cache hits, swaps and preemptions are right for both.
    """

    def __init__(self, draft: Any, inner: Any) -> None:
        super().__init__(inner)
        self.draft = draft

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Any:
        self.propose(plan)
        return self.inner.execute(plan)

    def propose(self, plan: StepPlan) -> None:
        """Writes the drafts of the plan, and for temperatures above 0 the distributions they were drawn from.

        One token at a time, for all sequences at once; the last pass only stores KV, in case all are accepted.
        """
        rest = [replace(chunk, samples=[]) for chunk in plan.chunks if not chunk.draft]
        self.draft.execute(replace(plan, chunks=rest))
        drafted = [chunk for chunk in plan.chunks if chunk.draft]
        probs: dict[int, list[Tensor]] = {}
        for i in range(1 + max((len(chunk.draft) for chunk in drafted), default=-1)):
            step = StepPlan(plan.step, [_ahead(chunk, i) for chunk in drafted if i <= len(chunk.draft)])
            logits = self.draft.execute(step)
            guessing = [chunk for chunk in drafted if i < len(chunk.draft)]
            guesses = [token.token_id for token in sample(logits, step) if token is not None]
            for chunk, token in zip(guessing, guesses, strict=True):
                chunk.draft[i] = max(token, 0)  # any guess will do where the draft model can draw nothing
            self._remember(logits, guesses, step, probs)
        for chunk in drafted:
            if chunk.seq.seq_id in probs:
                chunk.draft_probs = torch.stack(probs[chunk.seq.seq_id])

    def _remember(self, logits: Tensor, guesses: list[int], step: StepPlan, probs: dict[int, list[Tensor]]) -> None:
        """Adds the distributions of the step's random tokens to ``probs``, by sequence."""
        rows = [i for i, (request, _) in enumerate(step.samples) if request.params.temperature > 0]
        if rows:
            requests, seqs = zip(*(step.samples[i] for i in rows), strict=True)
            adjusted = adjust(logits[rows].float(), list(requests), list(seqs))
            said = distribution(adjusted, [r.params for r in requests])
            for i, seq, row in zip(rows, seqs, said, strict=True):
                if guesses[i] == NOTHING:  # then its guess was token 0, for certain
                    row = torch.zeros_like(row)
                    row[0] = 1
                probs.setdefault(seq.seq_id, []).append(row)


def _ahead(chunk: Chunk, count: int) -> Chunk:
    """A chunk of the last token after ``count`` draft tokens; it samples the next draft token, if there is one."""
    seq = replace(chunk.seq, tokens=chunk.seq.tokens + chunk.draft[:count])
    samples = [seq] if count < len(chunk.draft) else []
    return Chunk(chunk.request, seq, chunk.start + count, 1, samples, chunk.block_table)
