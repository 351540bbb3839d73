"""The scheduler's side of swapping: a preempted request waits with its blocks in CPU memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from minipaged.core.plan import StepPlan, Write
from minipaged.core.request import Request, Sequence, Status
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import Stage
from minipaged.errors import InvariantViolation
from minipaged.events import Preempted, Resumed
from minipaged.features.swap.swap_tables import SwapTables


class Swap(Stage):
    """Keeps preempted requests in ``requests_out``, in order of rank and arrival, with their blocks in ``space``.

    While one of them waits to come back, no other request is admitted.
    """

    scheduler: Scheduler

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.requests_out: list[Request] = []

    def bind(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.space = SwapTables(scheduler.memory, self.num_blocks, scheduler.events)  # type: ignore[arg-type]

    def requests(self) -> Collection[Request]:
        return self.requests_out

    def preempting(self, request: Request, plan: StepPlan) -> bool:
        """Running → swapped, with all blocks of the request, if the swap space has room for them."""
        seq_ids = [seq.seq_id for seq in self.scheduler.active(request)]
        if not self.space.can_swap_out(seq_ids):
            return False
        self.scheduler.insert(request, self.requests_out, Status.SWAPPED)
        self.scheduler.events.emit(Preempted, request.request_id, "swap", "no free block")
        plan.swap_outs += self.space.swap_out(seq_ids)
        return True

    def before_admission(self, plan: StepPlan) -> bool:
        """Swapped → running, in order of arrival, if each request's blocks and those for its next tokens fit."""
        scheduler, space = self.scheduler, self.space
        while self.requests_out:
            request = self.requests_out[0]
            seqs = [seq for seq in request.live if seq.seq_id in space.tables]
            # One token each, if there is one to compute: a beam that waits for the others has computed all of its own.
            ends = [min(seq.num_computed + 1, len(seq.tokens)) for seq in seqs]
            writes = [Write(seq.seq_id, seq.num_computed, end) for seq, end in zip(seqs, ends, strict=True)]
            limits = scheduler.admission.limits(request)
            num_seqs = sum(r.width for r in scheduler.running) + request.width
            if num_seqs > limits.num_seqs or len(writes) > limits.num_tokens - plan.num_tokens:
                break
            room = scheduler.memory.pool.num_free - scheduler.outstanding() - scheduler.growth()
            if space.blocks_needed_to_swap_in(writes) > room:
                if scheduler.running:
                    break
                scheduler.outgrow(request, plan)  # it is alone and still does not fit
                continue
            self.requests_out.remove(request)
            scheduler.insert(request, scheduler.running, Status.RUNNING)
            scheduler.events.emit(Resumed, request.request_id)
            plan.swap_ins += space.swap_in([seq.seq_id for seq in seqs])
            counts = {seq.seq_id: min(1, scheduler.target(request, seq) - seq.num_computed) for seq in seqs}
            scheduler.place(request, scheduler.writes(request, counts), plan)
        return not self.requests_out

    def releasing(self, request: Request, seq: Sequence) -> None:
        if seq.seq_id in self.space.tables:
            self.space.free(seq.seq_id)

    def finished(self, request: Request) -> None:
        if request in self.requests_out:
            self.requests_out.remove(request)

    def failed(self, plan: StepPlan) -> Iterable[Request]:
        """Requests whose blocks may not have arrived in the swap space."""
        return [request for request in plan.preempted if request.status is Status.SWAPPED]

    def check(self) -> None:
        """Raises `InvariantViolation` if the swap space is inconsistent or does not match the swapped requests."""
        self.space.check()
        if not set(self.space.tables) <= {seq.seq_id for request in self.requests_out for seq in request.live}:
            raise InvariantViolation(
                f"sequences {set(self.space.tables)} have blocks in the swap space, but are not swapped out"
            )
        order = [(r.rank, r.arrival) for r in self.requests_out]
        if order != sorted(order):
            raise InvariantViolation("the swapped requests are not in order of rank and arrival")
