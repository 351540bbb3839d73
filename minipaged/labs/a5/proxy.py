"""The student's scheduler inside the real engine, watched at every call."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from minipaged.core.block_table import BlockTables
from minipaged.core.plan import Chunk, SampledToken, StepPlan, Write
from minipaged.core.request import Request, Sequence, Status
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import FCFS, MemoryManager
from minipaged.errors import InvalidConfig, InvalidRequest, OutOfBlocks
from minipaged.events import Admitted, Scheduled
from minipaged.features.speculative.drafts import Speculation
from minipaged.labs.student import Remote, StudentError, Violation


class Memory:
    """What the student's scheduler may ask of memory, request by request."""

    def __init__(self, scheduler: LabScheduler) -> None:
        self.fits, self.reserve, self.free = scheduler.fits, scheduler.reserve, scheduler.release


class LabScheduler(Scheduler):
    """The engine's scheduler, except that the student's code decides. What it asks memory for happens at once."""

    def __init__(
        self, student: Any, memory: MemoryManager, say: Callable[[str], None] = lambda line: None, **settings: Any
    ) -> None:
        super().__init__(memory, **settings)
        if any(isinstance(stage, Speculation) for stage in self.stages):
            raise InvalidConfig("lab A5's scheduler computes no tokens that might be taken back: leave speculate out")
        plain = isinstance(memory, BlockTables) and not memory.prefix_cache and type(self.admission) is FCFS
        if not plain or self.stages:
            raise InvalidConfig("lab A5 needs memory='paged', preemption='recompute', and no prefix caching")
        remote = Remote("memory", Memory(self), ("fits", "reserve", "free"))
        self._say = say
        self._theirs = student.new("Scheduler", remote, self.max_num_seqs, self.max_num_batched_tokens)
        self._known: dict[int, Request] = {}  # by order of arrival, which is the id that the student knows
        self._plan = StepPlan(0)
        self._reserved: dict[int, tuple[int, int]] = {}  # in this step: id → first and last token, exclusive
        self._lacking = False

    def add(self, request: Request) -> None:
        if request.width != 1 or not request.decoding.independent or request.prompt_logprobs is not None:
            raise InvalidRequest("lab A5's scheduler serves single sequences: no n, no beams, no prompt logprobs")
        room = self.memory.pool.num_blocks * self.memory.block_size
        request.max_output = min(request.max_output, room + 1 - len(request.prompt_token_ids))
        super().add(request)
        self._known[request.arrival] = request
        self._ask("add", request.arrival, len(request.prompt_token_ids))

    def refuse_forks(self) -> None:
        raise InvalidRequest("lab A5's scheduler knows no forks")

    def schedule(self) -> StepPlan:
        self._plan, self._reserved, self._lacking = StepPlan(self.step), {}, False
        told = self._read(self._ask("schedule"))
        self._say(f"step {self.step}: schedule() → chunks {told[0]}, preempted {told[1]}")
        judge(self, told)
        for number, (start, end) in self._reserved.items():
            request = self._known[number]
            (seq,) = request.live
            samples = [seq] if end == len(seq.tokens) else []
            chunk = Chunk(request, seq, start, end - start, samples, list(self.memory.tables[seq.seq_id]))
            self._plan.chunks.append(chunk)
        self._plan.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        for chunk in self._plan.chunks:
            self.events.emit(Scheduled, chunk.seq.seq_id, chunk.start, chunk.num_tokens)
        return self._plan

    def commit(self, plan: StepPlan, sampled: Seq[SampledToken | None]) -> list[Request]:
        requests = super().commit(plan, sampled)
        for chunk in plan.chunks:
            if chunk.request.status is not Status.FINISHED:
                self._ask("computed", chunk.request.arrival, chunk.seq.num_computed, len(chunk.seq.tokens))
        return requests

    def finish(self, request: Request, seq: Sequence, reason: str) -> None:
        super().finish(request, seq, reason)
        self._known.pop(request.arrival, None)
        self._ask("finish", request.arrival)

    # --- what the student's code calls while it plans ---

    def fits(self, number: int, end: int) -> bool:
        request = self._request(number, f"memory.fits({number}, {end})")
        (seq,) = request.live
        needed = self.memory.blocks_for(end) - len(self.memory.tables.get(seq.seq_id, []))
        fits = needed <= self.memory.pool.num_free
        self._lacking |= not fits and request.status is Status.RUNNING
        return fits

    def reserve(self, number: int, end: int) -> None:
        call = f"memory.reserve({number}, {end})"
        request = self._request(number, call)
        (seq,) = request.live
        start = seq.num_computed
        if number in self._reserved:
            raise Violation(f"{call}: request {number} has its slots for this step already", "reserve: twice")
        if type(end) is not int or not start < end <= len(seq.tokens):
            known = f"{start} of its {len(seq.tokens)} tokens are computed"
            raise Violation(f"{call}: request {number} cannot compute up to there: {known}", "reserve: range")
        if request.status is Status.WAITING:
            self._check_admission(request, call)
        if not self.fits(number, end):
            raise OutOfBlocks(f"there are not enough free blocks for {call}")
        if request.status is Status.WAITING:
            self.waiting.remove(request)
            self.insert(request, self.running, Status.RUNNING)
            self.events.emit(Admitted, request.request_id, seq.seq_id, 0)
            self.memory.open(seq.seq_id, [], self.demand(request))
        self.memory.reserve(Write(seq.seq_id, start, end))
        self._reserved[number] = (start, end)

    def release(self, number: int) -> None:
        call = f"memory.free({number})"
        request = self._request(number, call)
        if request.status is not Status.RUNNING:
            raise Violation(f"{call}: request {number} is waiting, and has no memory", "free: waiting")
        if not self._lacking:
            raise Violation(f"{call} preempts request {number}, though nothing lacked room", "free: no need")
        if self.running[-1] is not request:
            latest = self.running[-1].arrival
            raise Violation(f"{call} preempts request {number}, though request {latest} came later", "free: order")
        self.preempt(request, self._plan)
        self._reserved.pop(number, None)
        self._lacking = False

    def _check_admission(self, request: Request, call: str) -> None:
        number, first = request.arrival, self.waiting[0]
        if first is not request:
            why = f"though request {first.arrival} came first"
            raise Violation(f"{call} lets request {number} begin, {why}", "not FCFS")
        if len(self.running) >= self.max_num_seqs:
            raise Violation(f"{call} lets request {number} begin, but {self.max_num_seqs} run already", "max_num_seqs")
        if self._plan.preempted:
            lost = self._plan.preempted[-1].arrival
            raise Violation(f"{call} lets request {number} begin in a step that preempted request {lost}", "thrashing")

    def _request(self, number: Any, call: str) -> Request:
        if number not in self._known:
            raise Violation(f"{call}: there is no request {number!r}", "unknown request")
        return self._known[number]

    def _read(self, said: Any) -> tuple[list[tuple[int, int, int]], list[int]]:
        try:
            chunks, preempted = said
            found = [(number, start, count) for number, start, count in chunks]
            assert all(type(x) is int for chunk in found for x in chunk) and all(type(x) is int for x in preempted)
        except (TypeError, ValueError, AssertionError):
            raise Violation(f"schedule() returned {said!r} instead of a StepPlan", "plan: type") from None
        return found, list(preempted)

    def _ask(self, method: str, *args: int) -> Any:
        """All that the engine asks for is possible: whatever the student's code raises is wrong."""
        try:
            return self._theirs.call(method, *args)
        except StudentError as error:
            raise error.violation() from None

    def read_queues(self) -> list[list[int]]:
        return self._ask("queues")

    @property
    def lost(self) -> list[int]:
        """Who was preempted in this step."""
        return [request.arrival for request in self._plan.preempted]

    @property
    def reserved(self) -> dict[int, tuple[int, int]]:
        return self._reserved


def judge(scheduler: LabScheduler, told: tuple[list[tuple[int, int, int]], list[int]]) -> None:
    """Raises a `Violation` if a plan is not what its calls made, or is unjust, or leaves undone what it could do."""
    chunks, preempted = told
    reserved = {number: (start, end - start) for number, (start, end) in scheduler.reserved.items()}
    for number, start, count in chunks:
        if reserved.get(number) != (start, count):
            slots = f"tokens {start} to {start + count - 1} of request {number}"
            raise Violation(f"the plan computes {slots}, but has not reserved just these", "plan: slots")
    if len(chunks) != len(reserved):
        missing = sorted(set(reserved) - {chunk[0] for chunk in chunks}) or [chunk[0] for chunk in chunks]
        raise Violation(f"request {missing[0]} has slots reserved, but is not on the plan once", "plan: once")
    if preempted != scheduler.lost:
        raise Violation(f"the plan says that {preempted} were preempted, but it was {scheduler.lost}", "plan: victims")
    queues = [[request.arrival for request in queue] for queue in (scheduler.waiting, scheduler.running)]
    said = scheduler.read_queues()
    if said != queues:
        raise Violation(f"after schedule(), waiting and running are {said} instead of {queues}", "queues")
    counts = {number: count for number, _, count in chunks}
    spent = sum(counts.values())
    if spent > scheduler.max_num_batched_tokens:
        most = scheduler.max_num_batched_tokens
        raise Violation(f"the plan has {spent} tokens, but a step may compute {most}", "budget")
    if not scheduler.lost:
        judge_fairness(scheduler, counts)


def judge_fairness(scheduler: Scheduler, counts: dict[int, int]) -> None:
    """``counts``: tokens that each request computes. For steps without preemption."""
    left = scheduler.max_num_batched_tokens - sum(counts.values())
    wants = {r.arrival: len(r.live[0].tokens) - r.live[0].num_computed for r in scheduler.running}
    prompts = [number for number, want in wants.items() if want > 1]
    for number, want in wants.items():
        got = counts.get(number, 0)
        others = [other for other in prompts if counts.get(other) and (want == 1 or other > number)]
        if got < want and (left or others):
            why = f"{left} tokens of the budget are left" if left else f"request {others[0]} gets some"
            raise Violation(f"request {number} wants to compute {want} tokens and gets {got}, though {why}", "unfair")
    if scheduler.waiting and left and len(scheduler.running) < scheduler.max_num_seqs:
        first = scheduler.waiting[0]
        room = scheduler.memory.pool.num_free - scheduler.outstanding() - len(scheduler.running)
        if scheduler.memory.blocks_for(len(first.live[0].tokens) + 1) <= room:
            raise Violation(f"request {first.arrival} waits, though there is room for it in every respect", "idle")
