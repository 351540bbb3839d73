"""Lab A5: who runs next.

You write the methods that raise NotImplementedError. README.md, beside this file, says what they must do.

``memory`` is given to you. It knows how many blocks a request has, and how many are free:

    memory.fits(id, end) -> bool   are there enough free blocks to give this request slots for its tokens up to end?
    memory.reserve(id, end)        gives it these slots; raises OutOfBlocks if they do not fit
    memory.free(id)                takes all its slots away: what was computed in them is lost
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class OutOfBlocks(MemoryError):
    """There are not enough free blocks."""


@dataclass
class Request:
    """``num_tokens`` are known, prompt and output; the keys and values of the first ``num_computed`` are in memory.

    Ids are numbers in order of arrival: of two requests the one with the smaller id came first.
    """

    id: int
    num_tokens: int
    num_computed: int = 0


class Chunk(NamedTuple):
    """This step computes tokens start … start + num_tokens − 1 of a request."""

    id: int
    start: int
    num_tokens: int


class StepPlan(NamedTuple):
    """One step: what is computed, and which requests lost their memory when it was planned."""

    chunks: list[Chunk]
    preempted: list[int]


class Scheduler:
    """Moves requests between ``waiting`` and ``running``, both in order of arrival."""

    def __init__(self, memory, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.memory = memory
        self.max_num_seqs = max_num_seqs  # requests that may run at the same time
        self.max_num_batched_tokens = max_num_batched_tokens  # tokens that one step may compute
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted: list[int] = []  # in the step that is being planned

    def add(self, id: int, num_tokens: int) -> None:
        """A request arrives."""
        self.waiting.append(Request(id, num_tokens))

    def computed(self, id: int, num_computed: int, num_tokens: int) -> None:
        """A step is over: so far has this request got. If all its tokens were computed, it has a new one now."""
        for request in self.running:
            if request.id == id:
                request.num_computed, request.num_tokens = num_computed, num_tokens

    def finish(self, id: int) -> None:
        """A request has ended. The engine has freed its memory."""
        self.waiting = [request for request in self.waiting if request.id != id]
        self.running = [request for request in self.running if request.id != id]

    def queues(self) -> tuple[list[int], list[int]]:
        """What the checks look at after every step."""
        return [request.id for request in self.waiting], [request.id for request in self.running]

    # lab: A5.1, A5.2, A5.3
    def schedule(self) -> StepPlan:
        """Plans one step. When this returns, every token of the plan has its slot."""
        self.preempted = []
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        counts: dict[int, int] = {}
        # One token for whoever generates; what is left of the budget goes to prompts, oldest first.
        for request in sorted(self.running, key=lambda r: r.num_tokens - r.num_computed > 1):
            counts[request.id] = min(request.num_tokens - request.num_computed, budget)
            budget -= counts[request.id]
        for request in list(self.running):
            end = request.num_computed + counts[request.id]
            while request in self.running and not self.memory.fits(request.id, end):
                self.preempt(self.running[-1])
            if request in self.running and counts[request.id]:
                self.memory.reserve(request.id, end)
                chunks.append(Chunk(request.id, request.num_computed, counts[request.id]))
        while self.waiting and not self.preempted and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self.memory.fits(request.id, request.num_tokens):
                break
            self.running.append(self.waiting.pop(0))
            count = min(request.num_tokens - request.num_computed, budget)
            budget -= count
            self.memory.reserve(request.id, request.num_computed + count)
            chunks.append(Chunk(request.id, request.num_computed, count))
        return StepPlan(chunks, self.preempted)

    # lab: A5.3
    def preempt(self, victim: Request) -> None:
        """Takes the memory of a running request, which waits from now on, to compute all its tokens again."""
        self.memory.free(victim.id)
        victim.num_computed = 0
        self.running.remove(victim)
        self.waiting.insert(0, victim)
        self.preempted.append(victim.id)
