"""Who runs next: continuous batching, first come first served, with preemption when the pool runs out of blocks.

`Scheduler.schedule` decides one step and reserves its memory; `Scheduler.commit` applies the step's results.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence as Seq
from itertools import count

from minipaged.core.block_table import Demand
from minipaged.core.plan import Chunk, SampledToken, StepPlan, Write
from minipaged.core.request import Request, Sequence, Status, common_prefix
from minipaged.core.seams import FCFS, AdmissionPolicy, Limits, MemoryManager, Stage
from minipaged.errors import InvariantViolation, real_number  # typed errors

# What subscribers of the EventLog are told:
from minipaged.events import Admitted, EventLog, Filled, Finished, Forked, Preempted, Proposed, Sampled, Scheduled


class Scheduler:
    """Moves requests between ``waiting`` and ``running``, each queue in order of rank (0 by default) and arrival.

    In every step each running sequence that has all but its newest token computed gets its one token first
    (*decodes*); the rest of the token budget goes to prompts, in chunks, in the queue's order. When blocks run out, the
    last request is preempted with all its sequences: its KV is dropped and recomputed later (paper §4.5).

    ``admission`` decides who may start, ``stages`` add what the heart does not do (see `core.seams`).
    """

    def __init__(
        self,
        memory: MemoryManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        events: EventLog | None = None,
        admission: AdmissionPolicy | None = None,
        stages: Seq[Stage] = (),
    ) -> None:
        self.memory = memory
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.events = EventLog() if events is None else events
        self.next_seq_id = count().__next__  # here, because a beam search forks while the scheduler commits
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.step = 0
        self.num_preemptions = 0
        self.admission: AdmissionPolicy = FCFS() if admission is None else admission
        self.admission.bind(self)
        self.stages: list[Stage] = []
        for stage in stages:
            self.plug(stage)

    def plug(self, stage: Stage, first: bool = False) -> None:
        """Adds a stage behind the others, or before them."""
        self.stages.insert(0 if first else len(self.stages), stage)
        stage.bind(self)

    def add(self, request: Request) -> None:
        request.rank = self.admission.rank(request)
        real_number(request.rank, "an admission policy's rank", -1e15, 1e15)  # exact in the page's JavaScript; not NaN
        self.insert(request, self.waiting, Status.WAITING)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or any(stage.requests() for stage in self.stages))

    # --- deciding ---------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decides the next step. Every block it writes to is reserved when this returns."""
        plan = StepPlan(self.step)
        counts = self._spend(self.admission.limits(None).num_tokens, self.running)
        for request in list(self.running):
            # Victims of preemption come from the queue's end, so they are not on the plan yet.
            if request.status is Status.RUNNING:
                self.place(request, self._make_room(request, counts, plan), plan)
        # After a preemption, free blocks are for those that run.
        if not plan.preempted and not plan.outgrown and all(stage.before_admission(plan) for stage in self.stages):
            self.admit(plan)
        for stage in self.stages:
            stage.planned(plan)
        plan.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)  # stable: decodes first, else as queued
        if self.events.active:
            for chunk in plan.chunks:
                self.events.emit(Scheduled, chunk.seq.seq_id, chunk.start, chunk.num_tokens, len(chunk.draft))
        return plan

    def demand(self, request: Request) -> Demand:
        """What the request asks of memory."""
        lengths = [len(seq.tokens) for seq in request.live]
        lengths += [lengths[0]] * (request.width - len(lengths))  # beams that have not forked yet
        return Demand(lengths, request.fork_at, len(request.prompt_token_ids), request.max_output)

    def active(self, request: Request) -> list[Sequence]:
        """The live sequences that have a block table: all, or the lead alone until the others fork from it."""
        tables = self.memory.tables
        return [seq for seq in request.live if seq.seq_id in tables]

    def forking(self, request: Request) -> bool:
        """Whether the lead of a running request still computes alone: the fork is yet to come."""
        return request.live[-1].seq_id not in self.memory.tables

    def target(self, request: Request, seq: Sequence) -> int:
        """How far a sequence computes: to its last token, or to where the others fork from it."""
        return request.fork_at if self.forking(request) else request.decoding.target(request, seq)

    def _spend(self, budget: int, requests: list[Request]) -> dict[int, int]:
        """Tokens that each sequence computes in this step, by sequence id: decodes first, then prompt chunks."""
        wanted = [
            (seq.seq_id, self.target(request, seq) - seq.num_computed)
            for request in requests
            for seq in self.active(request)
        ]
        counts: dict[int, int] = {}
        for seq_id, want in sorted(wanted, key=lambda pair: pair[1] > 1):
            counts[seq_id] = spent = want if want < budget else budget
            budget -= spent
        return counts

    def writes(self, request: Request, counts: dict[int, int]) -> dict[Write, Sequence]:
        """What the sequences of a request write in this step; a sequence without tokens in ``counts`` is left out."""
        return {
            Write(seq.seq_id, seq.num_computed, seq.num_computed + count): seq
            for seq in request.live
            if (count := counts.get(seq.seq_id))
        }

    def _make_room(self, request: Request, counts: dict[int, int], plan: StepPlan) -> dict[Write, Sequence]:
        """Frees blocks for the request's part of this step: preempts those behind it, in the end the request itself.

        Returns what the request writes; nothing if it was preempted or ended.
        """
        while True:
            writes = self.writes(request, counts)
            if self.memory.blocks_needed(writes) <= self.memory.pool.num_free:
                return writes
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                self.outgrow(request, plan)
                if request.status is Status.FINISHED:
                    return {}
            else:
                self.preempt(victim, plan)
                if victim is request:
                    return {}

    def place(self, request: Request, writes: dict[Write, Sequence], plan: StepPlan) -> None:
        """Puts the request's sequences on the plan and reserves their slots."""
        memory = self.memory
        for write, seq in writes.items():
            _, start, end = write
            plan.copies += memory.reserve(write)
            candidates = request.live if self.forking(request) else [seq]
            samples = [s for s in candidates if len(s.tokens) == end]
            # Only the blocks in use: a contiguous manager's tables are as long as the sequence may ever get.
            table = memory.tables[seq.seq_id][: memory.blocks_for(end)]
            plan.chunks.append(Chunk(request, seq, start, end - start, samples, table))

    def admit(self, plan: StepPlan) -> None:
        """Waiting → running, in the policy's order, as long as tokens, sequences and blocks allow."""
        if not self.waiting:
            return
        budget = self.admission.limits(None).num_tokens - plan.num_tokens
        num_seqs = sum(request.width for request in self.running)
        outstanding = self.outstanding()  # updated below; recounting it for each request would be quadratic
        for request in list(self.admission.eligible(self.waiting)):  # a copy, because those that start leave the queue
            limits = self.admission.limits(request)
            if (budget <= 0 and limits.needs_tokens) or num_seqs + request.width > limits.num_seqs:
                break
            if not self.running:
                self._end_if_hopeless(request, plan)
                if request.status is Status.FINISHED:
                    continue
            hits = self.admission.hits(request)
            if not self.memory.fits(self.demand(request), hits, outstanding, self._growth_beside(request, limits)):
                break
            self.waiting.remove(request)
            num_seqs += request.width
            self.insert(request, self.running, Status.RUNNING)
            lead = request.live[0]
            lead.num_computed = len(hits) * self.memory.block_size
            self.events.emit(Admitted, request.request_id, lead.seq_id, lead.num_computed)
            self.memory.open(lead.seq_id, hits, self.demand(request))
            counts = self._spend(budget, [request])
            budget -= counts[lead.seq_id]
            self.place(request, self.writes(request, counts), plan)
            outstanding += self._outstanding(request)

    def insert(self, request: Request, queue: list[Request], status: Status) -> None:
        """Inserts the request into a queue, in order of rank and arrival, and sets its status."""
        insort(queue, request, key=lambda r: (r.rank, r.arrival))
        request.status = status

    def _end_if_hopeless(self, request: Request, plan: StepPlan) -> None:
        """Called when nothing else runs. If a request does not fit an empty pool (it was preempted when its sequences'
        next tokens needed more blocks than there are), sequences end, from the last one, until the others fit."""
        while request.live and not self.memory.fits(self.demand(request), self.admission.hits(request)):
            self.outgrow(request, plan)

    def _growth_beside(self, request: Request, limits: Limits) -> int:
        """Blocks to leave free at admission. A request that was preempted after it had output needs one more for each
        running sequence: else it would soon be preempted again."""
        resumes = any(seq.num_output for seq in request.live)
        return self.growth() * (limits.headroom + int(resumes)) if limits.headroom or resumes else 0

    def growth(self) -> int:
        """A block for each running sequence."""
        return sum(len(self.active(request)) for request in self.running)

    def outstanding(self) -> int:
        """Blocks that running requests have yet to take for the tokens that they have, and for a fork to come."""
        return sum(map(self._outstanding, self.running))

    def _outstanding(self, request: Request) -> int:
        memory, active = self.memory, self.active(request)
        if self.forking(request):  # its sequences will copy their last common block, or continue in blocks of their own
            return memory.blocks_to_hold(self.demand(request)) - len(memory.tables[active[0].seq_id])
        return sum(max(0, memory.blocks_for(len(seq.tokens)) - len(memory.tables[seq.seq_id])) for seq in active)

    def preempt(self, victim: Request, plan: StepPlan) -> None:
        """All or nothing: every sequence of the request gives up its blocks (paper §4.5)."""
        self.running.remove(victim)
        plan.preempted.append(victim)
        self.num_preemptions += 1
        if any(stage.preempting(victim, plan) for stage in self.stages):
            return
        active = self.active(victim)
        self.insert(victim, self.waiting, Status.WAITING)
        victim.fork_at = common_prefix(victim.live)  # what its sequences agree on is computed once
        self.events.emit(Preempted, victim.request_id, "recompute", "no free block")
        for seq in active:
            self._release(victim, seq)
            seq.num_computed = 0

    def outgrow(self, request: Request, plan: StepPlan) -> None:
        """The request has the pool to itself and needs more: its last sequence ends (a beam search ends whole)."""
        if not any(stage.reclaim(request, plan) for stage in self.stages):
            plan.outgrown.append(request)
            request.decoding.end(request, request.live[-1:], "length", self)

    # --- applying ---------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, sampled: Seq[SampledToken | None]) -> list[Request]:
        """Applies a step's results: KV is in place, tokens are appended, forks made, finished sequences freed.

        ``sampled`` has an entry for each of ``plan.samples``, ``None`` after a draft's first wrong token. Returns the
        requests that got a token or lost a sequence.
        """
        for chunk in plan.chunks:
            seq, request = chunk.seq, chunk.request
            known = chunk.num_tokens - len(chunk.draft)
            seq.num_computed += known
            if self.events.active:
                if chunk.draft:
                    self.events.emit(Proposed, seq.seq_id, list(chunk.draft), [piece(seq, t) for t in chunk.draft])
                self.events.emit(Filled, seq.seq_id, chunk.start, known)
            self.memory.mark_computed(seq.seq_id, seq.tokens, seq.num_computed)
            if seq.num_computed == request.fork_at and self.forking(request):
                for other in request.live:
                    if other.seq_id not in self.memory.tables:
                        self.events.emit(Forked, seq.seq_id, other.seq_id, request.request_id)
                        self.memory.fork(seq.seq_id, other.seq_id)
                        other.num_computed = seq.num_computed
        rows: dict[Request, list[tuple[Sequence, SampledToken]]] = {}
        for (request, seq), token in zip(plan.samples, sampled, strict=True):
            if token is not None:
                rows.setdefault(request, []).append((seq, token))
        for request, row in rows.items():
            request.decoding.advance(request, row, self)
            for stage in self.stages:
                stage.sampled(request)
        for stage in self.stages:
            stage.committed(plan)
        self.step += 1
        return list(dict.fromkeys([*plan.outgrown, *rows]))

    def abort(self, request: Request) -> None:
        """Ends a request in whatever state it is; every block comes back."""
        request.decoding.end(request, list(request.live), "abort", self)

    def take(self, request: Request, seq: Sequence, token: SampledToken, reason: str | None) -> str | None:
        """Appends a token and its text. Returns the finish reason, which a stop string may have changed."""
        seq.tokens.append(token.token_id)
        logprob: float | None = None
        top: list[tuple[int, float]] = []
        if token.logprobs is not None:
            logprob = token.logprobs[token.token_id]
            seq.cumulative_logprob += logprob
            if request.params.logprobs is not None:
                top = heapq.nlargest(request.params.logprobs, token.logprobs.items(), key=lambda item: item[1])
                seq.logprobs.append(dict(top) | {token.token_id: logprob})
        text = ""
        if seq.text is not None:
            if reason != "stop":  # a stop token's own text is not shown; push may hold text back
                text = seq.text.push(token.token_id)
                reason = "stop" if seq.text.stopped is not None else reason
            if reason and seq.text.stopped is None:
                text += seq.text.finish()
        if self.events.active:
            alternatives = [[token_id, piece(seq, token_id), value] for token_id, value in top]
            self.events.emit(Sampled, seq.seq_id, token.token_id, text, logprob, alternatives)
        return reason

    def finish(self, request: Request, seq: Sequence, reason: str) -> None:
        """Ends a sequence and frees its blocks; with its last sequence the request leaves its queue."""
        self._release(request, seq)
        if seq.text is not None:
            seq.text.finish()  # text held back belongs to the output; a second call does nothing
        request.end(seq, reason)
        self.events.emit(Finished, seq.seq_id, reason)
        if not request.live and request.status is not Status.FINISHED:
            queues = {Status.RUNNING: self.running, Status.WAITING: self.waiting}
            if request.status in queues:  # else a stage keeps it
                queues[request.status].remove(request)
            request.status = Status.FINISHED
            for stage in self.stages:
                stage.finished(request)

    def _release(self, request: Request, seq: Sequence) -> None:
        for stage in self.stages:
            stage.releasing(request, seq)
        if seq.seq_id in self.memory.tables:
            self.memory.free(seq.seq_id)

    def check(self) -> None:
        """Checks the queues against the block tables. Raises `InvariantViolation`."""
        active = {seq.seq_id: seq.num_computed for request in self.running for seq in self.active(request)}
        if set(active) != set(self.memory.tables):
            raise InvariantViolation(f"block tables of {set(self.memory.tables)} for the running {set(active)}")
        self.memory.check(active)
        if sum(request.width for request in self.running) > self.admission.limits(None).num_seqs:
            raise InvariantViolation("more sequences run than max_num_seqs allows")
        for queue in (self.waiting, self.running):
            order = [(r.rank, r.arrival) for r in queue]
            if order != sorted(order):
                raise InvariantViolation("a queue is out of the order of rank and arrival")
        for stage in self.stages:
            stage.check()


def piece(seq: Sequence, token_id: int) -> str:
    """The text of a token by itself, for subscribers of events."""
    return seq.text.piece(token_id) if seq.text is not None else f"<{token_id}>"
