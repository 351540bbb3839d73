"""The scheduler's side of speculative decoding: puts drafts on the plan, and settles them after verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from minipaged.core.plan import Chunk, StepPlan, Write
from minipaged.core.request import Request, Sequence
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import Stage
from minipaged.events import Filled, Speculated
from minipaged.features.speculative import PROMPT_LOOKUP

PENDING = -1  # placeholder: the draft model writes the token before the step computes it


class PromptLookup:
    """Drafts the tokens that followed the newest ones at their latest earlier occurrence (prompt lookup, Saxena 2023).

    Stores the latest position of every run of two and three tokens, so that a lookup costs the same however long a
    sequence is.
    """

    SIZES = (3, 2)  # longest first: a longer match predicts better

    def __init__(self) -> None:
        self._ends: WeakKeyDictionary[Sequence, dict[tuple[int, ...], int]] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def __call__(self, seq: Sequence, count: int) -> list[int]:
        """``count`` draft tokens, or none if the newest tokens have not occurred before."""
        tokens, ends = seq.tokens, self._ends.setdefault(seq, {})
        for end in range(self._seen.get(seq, 0), len(tokens)):
            ends.update((tuple(tokens[end - size : end]), end) for size in self.SIZES if size <= end)
        self._seen[seq] = len(tokens)
        found = (ends.get(tuple(tokens[-size:])) for size in self.SIZES if size < len(tokens))
        start = next((end for end in found if end is not None), None)
        if start is None:
            return []
        draft: list[int] = []
        for at in range(start, start + count):  # past the end it copies the draft, so repetitions go on
            draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
        return draft


class Speculation(Stage):
    """The stage that puts drafts on a plan, and settles them after the model has verified them.

    ``propose(seq, count)`` makes a draft of at most ``count`` tokens. ``num_proposed`` and ``num_accepted`` count
    tokens since the start.
    """

    scheduler: Scheduler

    def __init__(self, propose: Callable[[Sequence, int], list[int]], num_tokens: int) -> None:
        self.propose, self.num_tokens = propose, num_tokens
        self.num_proposed = self.num_accepted = 0
        self._drafted: dict[Request, list[Chunk]] = {}

    def planned(self, plan: StepPlan) -> None:
        """Adds drafts to decoding sequences, within what is left of the token budget and the free blocks.

        Everything else is already on the plan, so that no request waits or is preempted for a draft. Sequences that
        depend on each other, such as beams, decode one token at a time.
        """
        scheduler, self._drafted = self.scheduler, {}
        budget = scheduler.admission.limits(None).num_tokens - plan.num_tokens
        for chunk in plan.chunks:
            request, seq = chunk.request, chunk.seq
            # The model adds a token of its own behind an accepted draft; no token may exceed the request's max_output.
            count = min(self.num_tokens, budget, request.max_output - seq.num_output - 1)
            alone = request.decoding.independent and not scheduler.forking(request)
            decodes = chunk.num_tokens == 1 and chunk.samples == [seq] and alone
            if decodes and count > 0 and self._place(chunk, count, plan):
                self._drafted.setdefault(request, []).append(chunk)
                budget -= len(chunk.draft)

    def _place(self, chunk: Chunk, count: int, plan: StepPlan) -> bool:
        """Reserves slots for a draft and puts it on the chunk; ``False`` if there is no draft, or no room for any."""
        memory, seq_id, start = self.scheduler.memory, chunk.seq.seq_id, chunk.start + 1
        draft = self.propose(chunk.seq, count)
        while draft and memory.blocks_needed([Write(seq_id, start, start + len(draft))]) > memory.pool.num_free:
            draft.pop()
        if draft:
            end = start + len(draft)
            plan.copies += memory.reserve(Write(seq_id, start, end))
            chunk.draft, chunk.num_tokens, chunk.samples = draft, 1 + len(draft), [chunk.seq] * (1 + len(draft))
            chunk.block_table = memory.tables[seq_id][: memory.blocks_for(end)]
        return bool(draft)

    def sampled(self, request: Request) -> None:
        """Settles the request's drafts: accepted tokens have KV, and the blocks of rejected ones are freed."""
        memory, events = self.scheduler.memory, self.scheduler.events
        for chunk in self._drafted.pop(request, ()):
            seq, end = chunk.seq, chunk.start + 1
            accepted, blocks = 0, list[int]()
            # If the sequence goes on, its newest token is the model's own and has no KV, even if the draft had it.
            said = seq.tokens[end:] if seq.finish_reason else seq.tokens[end:-1]
            for token, guess in zip(said, chunk.draft, strict=False):
                if token != guess:
                    break
                accepted += 1
            if seq.finish_reason is None:
                if accepted:
                    seq.num_computed += accepted
                    events.emit(Filled, seq.seq_id, end, accepted)
                    memory.mark_computed(seq.seq_id, seq.tokens, seq.num_computed)
                blocks = memory.trim(seq.seq_id, seq.num_computed)
            self.num_proposed += len(chunk.draft)
            self.num_accepted += accepted
            events.emit(Speculated, seq.seq_id, len(chunk.draft), accepted, blocks)


def make_speculation(config: Any) -> Speculation:
    """The `Speculation` stage for ``config.speculate``."""
    propose = PromptLookup() if config.speculate == PROMPT_LOOKUP else _pending
    return Speculation(propose, config.num_speculative_tokens or 4)


def speculation_of(engine: Any) -> Speculation | None:
    """The engine's `Speculation` stage; ``None`` if it does not speculate."""
    return next((stage for stage in engine.scheduler.stages if isinstance(stage, Speculation)), None)


def _pending(seq: Sequence, count: int) -> list[int]:
    return [PENDING] * count
