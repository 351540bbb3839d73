"""Serves the groups that `planning.plan` makes, together with requests that belong to no batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from typing import Any, NamedTuple

from minipaged.core.block_table import BlockTables
from minipaged.core.params import SamplingParams
from minipaged.core.plan import StepPlan
from minipaged.core.prefix_cache import Hit
from minipaged.core.request import Request, Sequence
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import AdmissionPolicy, Limits, Stage
from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.events import GroupEnded, GroupStarted, PrefixKept, PrefixReleased
from minipaged.features.batchllm.planning import Plan
from minipaged.features.batchllm.planning import plan as plan_groups


class BatchItem(NamedTuple):
    """A request of a batch, as `Engine.add_request` takes it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None


@dataclass(eq=False)
class RunningGroup:
    """Requests that share their first ``num_blocks`` blocks, and the number of those that have not ended."""

    number: int
    num_blocks: int
    unfinished: int


class Groups(Stage):
    """An admission policy and a stage: runs groups beside the requests that ``base`` admits.

    Until a group's prefix is computed, only its first request is eligible, and none while that one runs. Only memory
    limits how many requests of a batch run: ``max_num_seqs`` counts only the others, and the tokens that a batch
    decodes are added to ``max_num_batched_tokens``. With ``by_count`` both limits count all requests.

    ``kept``: group number → its prefix, once it is computed. The group holds a reference of its own to these blocks.
    """

    scheduler: Scheduler
    memory: BlockTables

    def __init__(self, base: AdmissionPolicy, by_count: bool = False) -> None:
        self.base, self.by_count = base, by_count
        self.extra_args = base.extra_args
        self.group_of: dict[Request, RunningGroup] = {}
        self.kept: dict[int, list[Hit]] = {}
        self._numbers = count()

    def bind(self, scheduler: Scheduler) -> None:
        self.scheduler, self.memory = scheduler, scheduler.memory  # type: ignore[assignment]

    def group(self, requests: list[Request], num_blocks: int) -> None:
        """Makes a group of requests that were just added and whose prompts share their first ``num_blocks`` blocks."""
        group = RunningGroup(next(self._numbers), num_blocks, len(requests))
        self.group_of |= dict.fromkeys(requests, group)
        if num_blocks:
            self.scheduler.events.emit(GroupStarted, group.number, [r.request_id for r in requests], num_blocks)

    # --- admission --------------------------------------------------------------------------------------------

    def rank(self, request: Request) -> float:
        return self.base.rank(request)

    def eligible(self, waiting: list[Request]) -> list[Request]:
        """The base's eligible requests, without those that wait for their group's prefix."""
        if not self.group_of:
            return list(self.base.eligible(waiting))
        busy = self._busy([*self.scheduler.running, *(r for stage in self.scheduler.stages for r in stage.requests())])
        ready = []
        for request in self.base.eligible(waiting):
            group = self.group_of.get(request)
            if group and group.num_blocks and group.number not in self.kept:
                if group in busy:
                    continue
                busy.add(group)
            ready.append(request)
        return ready

    def limits(self, request: Request | None) -> Limits:
        """The base's limits plus what batches have running; a request of a batch is limited by memory alone."""
        limits = self.base.limits(request)
        if self.by_count or not self.group_of:
            return limits
        batched = sum(running.width for running in self.scheduler.running if running in self.group_of)
        limits = limits._replace(num_seqs=limits.num_seqs + batched, num_tokens=limits.num_tokens + batched)
        if request in self.group_of:  # memory is the only limit: without more headroom many would be preempted
            return limits._replace(num_seqs=inf, headroom=limits.headroom + 1)
        return limits

    def hits(self, request: Request) -> list[Hit]:
        group = self.group_of.get(request)
        return self.kept.get(group.number, []) if group else self.base.hits(request)

    # --- a group's life ---------------------------------------------------------------------------------------

    def committed(self, plan: StepPlan) -> None:
        for request in self.scheduler.running if self.group_of else ():
            for seq in self.scheduler.active(request)[:1]:
                self.keep(request, seq)

    def releasing(self, request: Request, seq: Sequence) -> None:
        self.keep(request, seq)  # before its blocks are freed

    def finished(self, request: Request) -> None:
        if request in self.group_of:
            group = self.group_of.pop(request)
            group.unfinished -= 1
            if not group.unfinished:
                self.release(group)
                if group.num_blocks:
                    self.scheduler.events.emit(GroupEnded, group.number)

    def reclaim(self, request: Request, plan: StepPlan) -> bool:
        """Releases the prefixes of groups that have no running request; that of the request's own group last."""
        busy = self._busy(self.scheduler.running)
        idle = [group for group in dict.fromkeys(self.group_of.values()) if group.number in self.kept]
        idle = sorted((group for group in idle if group not in busy), key=lambda group: group.number)
        own = self.group_of.get(request)
        chosen = [group for group in idle if group is not own] or idle
        for group in chosen:
            self.release(group)
        return bool(chosen)

    def _busy(self, requests: list[Request]) -> set[RunningGroup]:
        return {self.group_of[request] for request in requests if request in self.group_of}

    def keep(self, request: Request, seq: Sequence) -> None:
        """Keeps the prefix for the group's other requests, if there are any, once the sequence has computed it."""
        group, memory = self.group_of.get(request), self.memory
        if not group or not group.num_blocks or group.number in self.kept or group.unfinished == 1:
            return
        if seq.seq_id in memory.tables and seq.num_computed >= group.num_blocks * memory.block_size:
            hits = self.kept[group.number] = memory.prefix(seq.seq_id, group.num_blocks)
            blocks = [hit.block for hit in hits]
            for block in blocks:
                memory.pool.share(block)
            memory.pinned += Counter(blocks)
            self.scheduler.events.emit(PrefixKept, group.number, blocks)

    def release(self, group: RunningGroup) -> None:
        """Drops the group's references to its kept prefix, if there is one, tail before head."""
        blocks = [hit.block for hit in reversed(self.kept.pop(group.number, []))]
        for block in blocks:
            self.memory.pool.free(block)
        self.memory.pinned -= Counter(blocks)
        if blocks:
            self.scheduler.events.emit(PrefixReleased, group.number, blocks)


def install(scheduler: Scheduler, by_count: bool = False) -> Groups:
    """Wraps the scheduler's admission policy in groups and plugs them in as a stage."""
    groups = Groups(scheduler.admission, by_count)
    scheduler.admission = groups
    scheduler.plug(groups, first=True)  # a prefix is kept before other stages see its blocks released
    return groups


def groups_in(engine: Any) -> Groups | None:
    """The engine's groups; ``None`` before its first batch."""
    return next((stage for stage in engine.scheduler.stages if isinstance(stage, Groups)), None)


def add_batch(engine: Any, batch: list[BatchItem], plan: Callable[..., Plan] = plan_groups) -> int:
    """Queues the requests of a batch in groups with a common prefix; ``plan`` makes the groups.

    A group's prefix is computed once and kept until all its requests have ended. Memory alone limits how many requests
    of a batch run. Each request gets the tokens that `Engine.add_request` would give. Returns the number of prompt
    tokens that need not be computed: exactly, unless a request is aborted, ends at the pool's limit, or needs the whole
    pool. Raises `InvalidConfig` for an engine that shares no blocks, `InvalidRequest` if any request cannot be served:
    nothing has changed then.
    """
    engine.config.check_schedule("batchllm")
    scheduler = engine.scheduler
    if not hasattr(scheduler, "admission"):
        raise InvalidConfig(f'schedule="batchllm" needs admission policies, not a {type(scheduler).__name__}')
    prompts = [engine.check_request(*item[:3]) for item in batch]
    if len({item.request_id for item in batch}) < len(batch):
        raise InvalidRequest("two requests of the batch have the same id; give each its own")
    # Seeds are drawn in the order of the batch, so that no seed depends on the schedule.
    params = [replace(item.params, seed=engine.seed(item.params)) for item in batch]
    outputs = [engine.max_output(prompt, one) * one.n for prompt, one in zip(prompts, params, strict=True)]
    # Prompt log-probabilities need all logits: such a prompt shares nothing, so we plan it with a unique first token.
    shared = [
        prompt if one.prompt_logprobs is None else [-1 - index, *prompt[1:]]
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    groups = groups_in(engine) or install(scheduler)
    planned = plan(shared, outputs, engine.memory.block_size)
    for group in planned.groups:
        requests = [engine.enqueue(batch[i].request_id, prompts[i], params[i], batch[i].prompt) for i in group.members]
        groups.group(requests, group.num_blocks)
    return planned.saved_tokens
