"""The stage that asks a policy's predictor about each request, and stores the bit with the request's blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minipaged.core.plan import StepPlan
from minipaged.core.request import Request, Sequence, Status
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import Stage
from minipaged.events import Predicted


class Predictions(Stage):
    """Asks the policy's predictor about each request. Does nothing for a policy without ``predict``.

    ``bits``: running request → 1 if its blocks will not be needed again in time. A preempted request is asked about
    again when it resumes; until then its cached blocks keep the bit, and a 1 is wrong in the meantime.
    """

    scheduler: Scheduler

    def __init__(self) -> None:
        self.bits: dict[Request, bool] = {}
        self._asked: list[Request] = []  # asked about in this step

    def bind(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        cache = getattr(scheduler.memory, "prefix_cache", None)
        self._policy: Any = cache.policy if cache is not None else None

    def planned(self, plan: StepPlan) -> None:
        self._asked = []
        for request in plan.preempted:
            if request.status is Status.WAITING:
                self.bits.pop(request, None)
        if getattr(self._policy, "predict", None) is None:
            return
        for chunk in sorted(plan.chunks, key=lambda chunk: chunk.num_tokens > 1):  # decodes first, as in the plan
            request = chunk.request
            if request not in self.bits:
                self.bits[request] = bool(self._policy.predict(chunk.seq.tokens[: chunk.seq.num_prompt]))
                self._asked.append(request)

    def forked(self, parent: Request, child: Request) -> None:
        if parent in self.bits:
            self.bits[child] = self.bits[parent]

    def releasing(self, request: Request, seq: Sequence) -> None:
        table = self.scheduler.memory.tables.get(seq.seq_id)
        if request in self.bits and table:
            self.scheduler.events.emit(
                Predicted, self._policy.note(table[::-1], self.bits[request]), self.bits[request]
            )

    def committed(self, plan: StepPlan) -> None:
        # Not in `finished`: a beam search frees blocks after its last hypothesis has ended.
        for request in [request for request in self.bits if request.status is Status.FINISHED]:
            del self.bits[request]

    def failed(self, plan: StepPlan) -> Iterable[Request]:
        for request in self._asked:  # their prompts were not computed
            self.bits.pop(request, None)
        return ()
