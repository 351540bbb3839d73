"""Who runs next: continuous batching, first come first served, with preemption when the pool runs dry.

`Scheduler.schedule` decides one step and reserves its memory; `Scheduler.commit` applies the step's results.
"""

from __future__ import annotations

from collections import deque

from minipaged.errors import InvariantViolation
from minipaged.events import Admitted, EventLog, Filled, Finished, Preempted, Sampled, Scheduled
from minipaged.memory.table import BlockTables, Write
from minipaged.request import Request, Sequence, Status
from minipaged.scheduling.plan import Chunk, SampledToken, StepPlan


class Scheduler:
    """Moves requests between ``waiting`` (in order of arrival) and ``running`` (likewise).

    In every step each running sequence that has all but its newest token computed gets its one token first
    (*decodes*); what is left of the token budget goes to prompts, in chunks, oldest request first. When blocks run
    out, the latest arrival is preempted whole and waits to be recomputed (paper §4.5).
    """

    def __init__(
        self,
        memory: BlockTables,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        events: EventLog | None = None,
    ) -> None:
        self.memory = memory
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.events = EventLog() if events is None else events
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.step = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    # --- deciding ---------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decides the next step. Every block it writes to is reserved when this returns."""
        plan = StepPlan(self.step)
        counts = self._spend_budget()
        for request in list(self.running):
            # Oldest first, so that whoever is preempted for lack of blocks has not been placed yet.
            if request.status is Status.RUNNING and self._make_room(request, counts, plan):
                self._place(request, counts, plan)
        if not plan.preempted and not plan.outgrown:
            self._admit(plan)
        plan.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)  # stable: decodes first, else by arrival
        for chunk in plan.chunks:
            self.events.emit(Scheduled, chunk.seq.seq_id, chunk.start, chunk.num_tokens)
        return plan

    def blocks_to_hold(self, request: Request) -> int:
        """Blocks a request occupies once all its known tokens and one more per sequence are in place."""
        memory, live = self.memory, request.live
        shared = request.fork_at // memory.block_size
        return shared + sum(memory.blocks_for(len(seq.tokens) + 1) - shared for seq in live)

    def _active(self, request: Request) -> list[Sequence]:
        """The sequences that compute: all live ones, or the lead alone until the others fork from it."""
        return [seq for seq in request.live if seq.seq_id in self.memory.tables]

    def _forking(self, request: Request) -> bool:
        """Whether the lead still computes alone, for all of them."""
        return len(self._active(request)) < len(request.live)

    def _target(self, request: Request, seq: Sequence) -> int:
        """How far a sequence computes: to its last token, or to where the others fork off."""
        return request.fork_at if self._forking(request) else len(seq.tokens)

    def _spend_budget(self) -> dict[int, int]:
        """Tokens each running sequence computes in this step, by sequence id: decodes first, then prompt chunks."""
        wanted: list[tuple[int, int]] = []
        for request in self.running:
            wanted += [
                (seq.seq_id, self._target(request, seq) - seq.num_computed) for seq in self._active(request)
            ]
        budget = self.max_num_batched_tokens
        counts: dict[int, int] = {}
        for seq_id, want in sorted(wanted, key=lambda item: item[1] > 1):
            counts[seq_id] = min(want, budget)
            budget -= counts[seq_id]
        return counts

    def _make_room(self, request: Request, counts: dict[int, int], plan: StepPlan) -> bool:
        """Frees blocks for the request's part of this step, at the cost of later arrivals and in the end its own."""
        while True:
            writes = [
                Write(seq.seq_id, seq.num_computed, seq.num_computed + counts[seq.seq_id])
                for seq in self._active(request)
                if counts[seq.seq_id]
            ]
            if self.memory.blocks_needed(writes) <= self.memory.pool.num_free:
                return True
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                self._outgrow(request, plan)
                if request.status is Status.FINISHED:
                    return False
            else:
                self._preempt(victim, plan)
                if victim is request:
                    return False

    def _place(self, request: Request, counts: dict[int, int], plan: StepPlan) -> None:
        """Puts the request's sequences on the plan and reserves their slots."""
        for seq in self._active(request):
            start, end = seq.num_computed, seq.num_computed + counts[seq.seq_id]
            if start == end:
                continue  # the budget went to others
            plan.copies += self.memory.reserve(Write(seq.seq_id, start, end))
            samples: list[Sequence] = []
            if end == self._target(request, seq):
                samples = [s for s in request.live if len(s.tokens) == end] if self._forking(request) else [seq]
            plan.chunks.append(
                Chunk(request, seq, start, end - start, samples, self.memory.tables[seq.seq_id])
            )

    def _admit(self, plan: StepPlan) -> None:
        """Waiting → running, in order of arrival, as long as tokens, sequences and blocks allow."""
        budget = self.max_num_batched_tokens - plan.num_tokens
        num_seqs = sum(len(request.live) for request in self.running)
        while self.waiting and budget > 0:
            request = self.waiting[0]
            if num_seqs + len(request.live) > self.max_num_seqs or not self._fits(request, plan):
                break
            if request.status is Status.FINISHED:
                continue  # it had outgrown the pool and `_fits` ended it
            num_seqs += len(request.live)
            self.waiting.popleft()
            self.running.append(request)
            request.status = Status.RUNNING
            lead = request.live[0]
            hits = self.memory.match(lead.tokens[: request.fork_at])
            lead.num_computed = len(hits) * self.memory.block_size
            self.events.emit(Admitted, request.request_id, lead.seq_id, lead.num_computed)
            self.memory.open(lead.seq_id, hits)
            counts = {lead.seq_id: min(budget, self._target(request, lead) - lead.num_computed)}
            budget -= counts[lead.seq_id]
            self._place(request, counts, plan)

    def _fits(self, request: Request, plan: StepPlan) -> bool:
        """Whether the pool can hold the request beside what the running ones still need for their known tokens."""
        request.fork_at = _common_prefix(request.live)
        hits = self.memory.match(request.live[0].tokens[: request.fork_at])
        in_use = sum(self.memory.pool.ref_counts[hit.block] > 0 for hit in hits)
        free = self.memory.pool.num_free - sum(map(self._owed, self.running))
        while self.blocks_to_hold(request) - in_use > free:
            if self.running:
                return False
            # Alone in the pool and still too large: it came back from preemption longer than the pool is.
            self._outgrow(request, plan)
            if request.status is Status.FINISHED:
                break
        return True

    def _owed(self, request: Request) -> int:
        """Blocks that a running request's prompt, computed in chunks, has yet to take."""
        active = self._active(request)
        if self._forking(request):
            return self.blocks_to_hold(request) - len(self.memory.tables[active[0].seq_id])
        return sum(
            max(0, self.memory.blocks_for(len(seq.tokens)) - len(self.memory.tables[seq.seq_id])) for seq in active
        )

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """All or nothing: every sequence of the request gives up its blocks and will be recomputed (paper §4.5)."""
        self.running.remove(victim)
        self.waiting.appendleft(victim)  # victims go latest first, so the queue stays in order of arrival
        victim.status = Status.WAITING
        plan.preempted.append(victim)
        self.events.emit(Preempted, victim.request_id, "no free block")
        for seq in self._active(victim):
            self.memory.free(seq.seq_id)
            seq.num_computed = 0

    def _outgrow(self, request: Request, plan: StepPlan) -> None:
        """The request has the pool to itself and needs more: its last sequence ends where it is."""
        plan.outgrown.append(request)
        self._finish(request, request.live[-1], "length")

    # --- applying ---------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, sampled: list[SampledToken]) -> list[Request]:
        """Applies a step's results: KV is in place, tokens are appended, forks made, finished sequences freed.

        Returns the requests that got a token or lost a sequence.
        """
        for chunk in plan.chunks:
            seq, request = chunk.seq, chunk.request
            seq.num_computed += chunk.num_tokens
            self.events.emit(Filled, seq.seq_id, chunk.start, chunk.num_tokens)
            self.memory.computed(seq.seq_id, seq.tokens, seq.num_computed)
            if seq.num_computed == request.fork_at:
                self._fork_others(request, seq)
        for (request, seq), token in zip(plan.samples, sampled, strict=True):
            self._append(request, seq, token)
        self.step += 1
        return list(dict.fromkeys([*plan.outgrown, *(request for request, _ in plan.samples)]))

    def abort(self, request: Request) -> None:
        """Ends a request in whatever state it is; every block comes back."""
        for seq in request.live:
            self._finish(request, seq, "abort")

    def check(self) -> None:
        """Invariants across the room. Raises `InvariantViolation`."""
        self.memory.check()
        active = {seq.seq_id for request in self.running for seq in self._active(request)}
        if active != set(self.memory.tables):
            raise InvariantViolation(f"block tables of {set(self.memory.tables)} for the running {active}")
        if sum(len(request.live) for request in self.running) > self.max_num_seqs:
            raise InvariantViolation("more sequences run than max_num_seqs allows")
        for request in self.running:
            for seq in self._active(request):
                held = len(self.memory.tables[seq.seq_id])
                if held != self.memory.blocks_for(seq.num_computed):
                    raise InvariantViolation(f"{held} blocks hold {seq.num_computed} tokens of sequence {seq.seq_id}")

    def _fork_others(self, request: Request, lead: Sequence) -> None:
        for seq in request.live:
            if seq.seq_id not in self.memory.tables:
                self.memory.fork(lead.seq_id, seq.seq_id)
                seq.num_computed = lead.num_computed

    def _append(self, request: Request, seq: Sequence, token: SampledToken) -> None:
        """The sequence takes its token, and ends if that token, its text or its length says so."""
        params = request.params
        seq.tokens.append(token.token_id)
        logprob = None
        if token.logprobs is not None:
            seq.logprobs.append(token.logprobs)
            logprob = token.logprobs[token.token_id]
            seq.cumulative_logprob += logprob
        is_eos = token.token_id in self.eos_token_ids and not params.ignore_eos
        reason = "stop" if is_eos or token.token_id in params.stop_token_ids else None
        text = ""
        if seq.text is not None:
            if reason is None:  # the text of a token that ends the sequence is not shown
                text = seq.text.push(token.token_id)
                reason = "stop" if seq.text.stopped is not None else None
        if reason is None and (seq.num_output == params.max_tokens or len(seq.tokens) >= self.max_model_len):
            reason = "length"
        if reason and seq.text is not None and seq.text.stopped is None:
            text += seq.text.finish()
        self.events.emit(Sampled, seq.seq_id, token.token_id, text, logprob)
        if reason:
            self._finish(request, seq, reason)

    def _finish(self, request: Request, seq: Sequence, reason: str) -> None:
        if seq.seq_id in self.memory.tables:
            self.memory.free(seq.seq_id)
        seq.finish_reason = reason
        self.events.emit(Finished, seq.seq_id, reason)
        if not request.live:
            queue = self.running if request.status is Status.RUNNING else self.waiting
            queue.remove(request)
            request.status = Status.FINISHED


def _common_prefix(seqs: list[Sequence]) -> int:
    """How many tokens all of the sequences agree on."""
    first = seqs[0].tokens
    length = min(len(seq.tokens) for seq in seqs)
    for seq in seqs[1:]:
        length = next((i for i in range(length) if seq.tokens[i] != first[i]), length)
    return length
