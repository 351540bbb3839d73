"""Speculative decoding: tokens are guessed and computed together, and the model keeps those it would have said itself.

A step reads all weights of the model whether it computes one token of a sequence or five. So whoever is about to get
one token brings a *draft* of the next ones along, and gets as many as were guessed right, and one more (Leviathan et
al. 2023; Chen et al. 2023).

A draft is on the plan and nowhere else. Until tokens are accepted, neither the sequence nor the prefix cache knows of
them, so there is little to rewind: blocks that hold nothing else go back to the pool, and slots are written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from minipaged.config import PROMPT_LOOKUP, EngineConfig
from minipaged.events import Filled, Speculated
from minipaged.memory.table import Write
from minipaged.request import Request, Sequence
from minipaged.scheduling.plan import Chunk, StepPlan

if TYPE_CHECKING:
    from minipaged.scheduling.scheduler import Scheduler

PENDING = -1  # a token that the draft model will have said before the step computes it


class PromptLookup:
    """Guesses that what followed the newest tokens when they last stood together follows them again (Saxena 2023).

    The latest place of every run of two and three tokens is kept, so that looking costs the same however long a
    sequence is.
    """

    SIZES = (3, 2)  # the longer run of tokens is the better witness

    def __init__(self) -> None:
        self._ends: WeakKeyDictionary[Sequence, dict[tuple[int, ...], int]] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def __call__(self, seq: Sequence, count: int) -> list[int]:
        """``count`` tokens, or none if the newest ones are without precedent."""
        tokens, ends = seq.tokens, self._ends.setdefault(seq, {})
        for end in range(self._seen.get(seq, 0), len(tokens)):
            ends.update((tuple(tokens[end - size : end]), end) for size in self.SIZES if size <= end)
        self._seen[seq] = len(tokens)
        found = (ends.get(tuple(tokens[-size:])) for size in self.SIZES if size < len(tokens))
        start = next((end for end in found if end is not None), None)
        if start is None:
            return []
        draft: list[int] = []
        for at in range(start, start + count):  # past the end it goes on with the draft: what repeats, repeats
            draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
        return draft


class Speculation:
    """Puts drafts on a plan, and settles them when the model has spoken.

    ``propose`` makes a draft of at most so many tokens for a sequence. ``num_proposed`` and ``num_accepted`` count
    tokens since the start.
    """

    def __init__(self, propose: Callable[[Sequence, int], list[int]], num_tokens: int) -> None:
        self.propose, self.num_tokens = propose, num_tokens
        self.num_proposed = self.num_accepted = 0
        self._drafted: dict[Request, list[Chunk]] = {}

    def extend(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Lets those who decode speculate with what is left: tokens of the budget, and blocks that are free.

        It comes after everything else has been placed, so that nobody waits or is preempted for a guess. What beams
        say next is a matter between all of them, so they go on one token at a time.
        """
        self._drafted = {}
        budget = scheduler.max_num_batched_tokens - plan.num_tokens
        for chunk in plan.chunks:
            request, seq = chunk.request, chunk.seq
            # The model itself adds a token behind an accepted draft; none may be beyond what the request allows.
            count = min(self.num_tokens, budget, request.max_output - seq.num_output - 1)
            forked = request.live[-1].seq_id in scheduler.memory.tables  # else others will fork off it after this step
            decodes = chunk.num_tokens == 1 and chunk.samples == [seq] and forked and not request.beams
            if decodes and count > 0 and self._place(chunk, count, plan, scheduler):
                self._drafted.setdefault(request, []).append(chunk)
                budget -= len(chunk.draft)

    def _place(self, chunk: Chunk, count: int, plan: StepPlan, scheduler: Scheduler) -> bool:
        """Reserves slots for a draft and puts it on the chunk; ``False`` if there is none, or no room for any of it."""
        memory, seq_id, start = scheduler.memory, chunk.seq.seq_id, chunk.start + 1
        draft = self.propose(chunk.seq, count)
        while draft and memory.blocks_needed([Write(seq_id, start, start + len(draft))]) > memory.pool.num_free:
            draft.pop()
        if draft:
            end = start + len(draft)
            plan.copies += memory.reserve(Write(seq_id, start, end))
            chunk.draft, chunk.num_tokens, chunk.samples = draft, 1 + len(draft), [chunk.seq] * (1 + len(draft))
            chunk.block_table = memory.tables[seq_id][: memory.blocks_for(end)]
        return bool(draft)

    def settle(self, request: Request, scheduler: Scheduler) -> None:
        """The request's sequences have taken their tokens: those that were guessed have KV, and the wrong guesses'
        blocks are given back."""
        for chunk in self._drafted.pop(request, ()):
            seq, end, memory = chunk.seq, chunk.start + 1, scheduler.memory
            accepted, blocks = 0, list[int]()
            # Of who goes on, the newest token is the model's own and has no KV, even if it is what was guessed.
            said = seq.tokens[end:] if seq.finish_reason else seq.tokens[end:-1]
            for token, guess in zip(said, chunk.draft, strict=False):
                if token != guess:
                    break
                accepted += 1
            if seq.finish_reason is None:
                if accepted:
                    seq.num_computed += accepted
                    scheduler.events.emit(Filled, seq.seq_id, end, accepted)
                    memory.computed(seq.seq_id, seq.tokens, seq.num_computed)
                blocks = memory.trim(seq.seq_id, seq.num_computed)
            self.num_proposed += len(chunk.draft)
            self.num_accepted += accepted
            scheduler.events.emit(Speculated, seq.seq_id, len(chunk.draft), accepted, blocks)


def make_speculation(config: EngineConfig) -> Speculation | None:
    """What ``config.speculate`` names; ``None`` if nobody speculates."""
    if config.speculate is None:
        return None
    propose = PromptLookup() if config.speculate == PROMPT_LOOKUP else _pending
    return Speculation(propose, config.num_speculative_tokens or 4)


def _pending(seq: Sequence, count: int) -> list[int]:
    return [PENDING] * count
