"""Serving the groups that `batchllm.plan` makes, beside requests that belong to no batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Any

from minipaged.events import GroupEnded, GroupStarted
from minipaged.memory.table import BlockTables, Hit
from minipaged.request import Request, Sequence, Status
from minipaged.scheduling.plan import SampledToken, StepPlan
from minipaged.scheduling.scheduler import Scheduler


@dataclass(eq=False)
class RunningGroup:
    """Requests that share their first ``num_blocks`` blocks, and how many of them have not ended."""

    number: int
    num_blocks: int
    unfinished: int


class BatchScheduler(Scheduler):
    """`Scheduler`, and of a batch's groups: the first request of each computes what they share, the others wait for it.

    The common beginning is kept, whoever ends or is preempted, until the whole group has ended. Nothing else is looked
    up in the prefix cache for them, so that what is saved is what was planned. Memory alone limits how many requests
    of a batch run: ``max_num_seqs`` counts only the others, and the tokens that a batch decodes come on top of
    ``max_num_batched_tokens``.
    """

    memory: BlockTables

    def __init__(self, memory: Any, **settings: Any) -> None:
        super().__init__(memory, **settings)
        self.group_of: dict[Request, RunningGroup] = {}
        self._numbers = count()

    def group(self, requests: list[Request], num_blocks: int) -> None:
        """Makes a group of requests that were just added. All prompts begin with the same ``num_blocks`` blocks."""
        group = RunningGroup(next(self._numbers), num_blocks, len(requests))
        self.group_of |= dict.fromkeys(requests, group)
        if num_blocks:
            self.events.emit(GroupStarted, group.number, [request.request_id for request in requests], num_blocks)

    # --- limits -----------------------------------------------------------------------------------------------

    @property
    def max_num_seqs(self) -> int:
        """The limit for those who are in no batch, on top of what a batch has running."""
        return self._max_num_seqs + self._batched()

    @max_num_seqs.setter
    def max_num_seqs(self, limit: int) -> None:
        self._max_num_seqs = limit

    @property
    def max_num_batched_tokens(self) -> int:
        return self._max_num_batched_tokens + self._batched()

    @max_num_batched_tokens.setter
    def max_num_batched_tokens(self, limit: int) -> None:
        self._max_num_batched_tokens = limit

    def _seats(self, request: Request) -> float:
        return inf if self._by_memory(request) else self.max_num_seqs

    def _batched(self) -> int:
        """Running sequences that belong to a batch."""
        if not self.group_of:
            return 0
        return sum(request.width for request in self.running if self._by_memory(request))

    def _by_memory(self, request: Request) -> bool:
        """Whether memory alone limits how many of its kind run."""
        return request in self.group_of

    # --- admission --------------------------------------------------------------------------------------------

    def _admit(self, plan: StepPlan) -> None:
        """Those who wait for their group's beginning are passed over; all others are admitted in order of arrival."""
        if not self.group_of:
            return super()._admit(plan)
        everybody, ready = self.waiting, self._ready()
        self.waiting = list(ready)
        super()._admit(plan)
        gone = set(ready) - set(self.waiting)
        self.waiting = [request for request in everybody if request not in gone]

    def _ready(self) -> list[Request]:
        """Of each group whose beginning nobody has computed yet only the first, and if one is at it, nobody."""
        busy = {self.group_of[request] for request in (*self.running, *self.swapped) if request in self.group_of}
        ready = []
        for request in self.waiting:
            group = self.group_of.get(request)
            if group and group.num_blocks and group.number not in self.memory.kept:
                if group in busy:
                    continue
                busy.add(group)
            ready.append(request)
        return ready

    def _hits(self, request: Request) -> list[Hit]:
        group = self.group_of.get(request)
        return self.memory.kept.get(group.number, []) if group else super()._hits(request)

    def _fits(self, request: Request, plan: StepPlan, owed: int) -> bool:
        """With memory as the only limit, whoever runs is left a block to grow into: else many would be preempted."""
        if self._by_memory(request):
            owed += self._growth()
        if self.group_of and not self.running:
            lacking = self.blocks_to_hold(request) - len(self._hits(request)) > self.memory.pool.num_free
            if lacking:
                self._release_idle(self.group_of.get(request))
        return super()._fits(request, plan, owed)

    def _outgrow(self, request: Request, plan: StepPlan) -> None:
        """Nobody ends early because of what is kept for others: they compute it again."""
        if not self._release_idle():
            super()._outgrow(request, plan)

    def _release_idle(self, spared: RunningGroup | None = None) -> bool:
        """Gives up what is kept for groups of which nobody runs. Returns whether there was any."""
        busy = {self.group_of[request] for request in self.running if request in self.group_of} | {spared}
        idle = {group for group in self.group_of.values() if group.number in self.memory.kept} - busy
        for group in sorted(idle, key=lambda group: group.number):  # a set has no order that repeats
            self.memory.release(group.number)
        return bool(idle)

    # --- a group's life ---------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, sampled: Seq[SampledToken | None]) -> list[Request]:
        done = super().commit(plan, sampled)
        if self.group_of:
            for request in self.running:
                for seq in self._active(request)[:1]:
                    self._keep(request, seq)
        return done

    def _finish(self, request: Request, seq: Sequence, reason: str) -> None:
        self._keep(request, seq)  # now, while it has its blocks
        super()._finish(request, seq, reason)
        if request.status is Status.FINISHED and request in self.group_of:
            group = self.group_of.pop(request)
            group.unfinished -= 1
            if not group.unfinished:
                self.memory.release(group.number)
                if group.num_blocks:
                    self.events.emit(GroupEnded, group.number)

    def _keep(self, request: Request, seq: Sequence) -> None:
        """Keeps the beginning for the others, if there are any, once the sequence has computed it."""
        group = self.group_of.get(request)
        if not group or not group.num_blocks or group.number in self.memory.kept or group.unfinished == 1:
            return
        if seq.seq_id in self.memory.tables and seq.num_computed >= group.num_blocks * self.memory.block_size:
            self.memory.keep(group.number, seq.seq_id, group.num_blocks)
