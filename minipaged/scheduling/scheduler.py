"""Who runs next: continuous batching, first come first served, with preemption when the pool runs dry.

`Scheduler.schedule` decides one step and reserves its memory; `Scheduler.commit` applies the step's results.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Sequence as Seq
from itertools import count

from minipaged.errors import InvariantViolation
from minipaged.events import (
    Admitted,
    EventLog,
    Filled,
    Finished,
    Forked,
    Preempted,
    Proposed,
    Resumed,
    Sampled,
    Scheduled,
)
from minipaged.memory.managers import MemoryManager
from minipaged.memory.table import Demand, Write
from minipaged.request import Request, Sequence, Status
from minipaged.scheduling.beam import Continuation
from minipaged.scheduling.plan import Chunk, SampledToken, StepPlan
from minipaged.scheduling.speculative import Speculation


class Scheduler:
    """Moves requests between ``waiting``, ``running`` and ``swapped``, each in order of arrival.

    In every step each running sequence that has all but its newest token computed gets its one token first
    (*decodes*); what is left of the token budget goes to prompts, in chunks, oldest request first. When blocks run
    out, the latest arrival is preempted whole: its KV is dropped and recomputed later, or swapped to the CPU and back
    (paper §4.5). Nobody is admitted while a swapped request waits.

    With ``static_batching`` nobody is admitted while anybody runs, as in FasterTransformer: the batch ends with its
    longest request (paper §6.1). With ``speculation`` decodes may bring a draft of further tokens along.
    """

    def __init__(
        self,
        memory: MemoryManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        static_batching: bool = False,
        events: EventLog | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.memory = memory
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.static_batching = static_batching
        self.speculation = speculation
        self.events = EventLog() if events is None else events
        self.next_seq_id = count().__next__  # here, because beams are born here
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.swapped: list[Request] = []
        self.step = 0
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    # --- deciding ---------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decides the next step. Every block it writes to is reserved when this returns."""
        plan = StepPlan(self.step)
        counts = self._spend(self.max_num_batched_tokens, self.running)
        for request in list(self.running):
            # Oldest first, so that whoever is preempted for lack of blocks has not been placed yet.
            if request.status is Status.RUNNING:
                self._place(request, self._make_room(request, counts, plan), plan)
        if not plan.preempted and not plan.outgrown:
            self._resume(plan)
            if not self.swapped:
                self._admit(plan)
        if self.speculation:
            self.speculation.extend(plan, self)
        plan.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)  # stable: decodes first, else by arrival
        self.memory.seal(plan)
        if self.events.active:
            for chunk in plan.chunks:
                self.events.emit(Scheduled, chunk.seq.seq_id, chunk.start, chunk.num_tokens, len(chunk.draft))
        return plan

    def blocks_to_hold(self, request: Request) -> int:
        """Blocks a request occupies once all its known tokens and one more per sequence are in place."""
        return self.memory.blocks_to_hold(self.demand(request))

    def demand(self, request: Request) -> Demand:
        """What the request asks of memory."""
        lengths = [len(seq.tokens) for seq in request.live]
        lengths += [lengths[0]] * (request.width - len(lengths))  # beams that are yet to fork off
        return Demand(lengths, request.fork_at, len(request.prompt_token_ids), request.max_output)

    def _active(self, request: Request) -> list[Sequence]:
        """The sequences that compute: all live ones, or the lead alone until the others fork from it."""
        tables = self.memory.tables
        return [seq for seq in request.live if seq.seq_id in tables]

    def _forking(self, request: Request) -> bool:
        """Whether the lead of a running request still computes alone, for all of them."""
        return request.live[-1].seq_id not in self.memory.tables

    def _target(self, request: Request, seq: Sequence) -> int:
        """How far a sequence computes: to its last token, or to where the others fork off."""
        if self._forking(request):
            return request.fork_at
        live = request.live
        if request.beams and len(live) > 1 and any(s.num_computed < len(s.tokens) - 1 for s in live):
            # Beams compete for the next token, so all of them must get there in the same step.
            return len(seq.tokens) - 1
        return len(seq.tokens)

    def _spend(self, budget: int, requests: list[Request]) -> dict[int, int]:
        """Tokens each sequence computes in this step, by sequence id: decodes first, then prompt chunks."""
        wanted = [
            (seq.seq_id, self._target(request, seq) - seq.num_computed)
            for request in requests
            for seq in self._active(request)
        ]
        counts: dict[int, int] = {}
        for seq_id, want in sorted(wanted, key=lambda item: item[1] > 1):
            counts[seq_id] = spent = want if want < budget else budget
            budget -= spent
        return counts

    def _writes(self, request: Request, counts: dict[int, int]) -> dict[Write, Sequence]:
        """What the request writes in this step, and who of it; nothing where the budget went to others."""
        return {
            Write(seq.seq_id, seq.num_computed, seq.num_computed + count): seq
            for seq in request.live
            if (count := counts.get(seq.seq_id))
        }

    def _make_room(self, request: Request, counts: dict[int, int], plan: StepPlan) -> dict[Write, Sequence]:
        """Frees blocks for the request's part of this step, at the cost of later arrivals and in the end its own.

        Returns what the request writes then: nothing if it was its own victim.
        """
        while True:
            writes = self._writes(request, counts)
            if self.memory.blocks_needed(writes) <= self.memory.pool.num_free:
                return writes
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                self._outgrow(request, plan)
                if request.status is Status.FINISHED:
                    return {}
            else:
                self._preempt(victim, plan)
                if victim is request:
                    return {}

    def _place(self, request: Request, writes: dict[Write, Sequence], plan: StepPlan) -> None:
        """Puts the request's sequences on the plan and reserves their slots."""
        memory = self.memory
        for write, seq in writes.items():
            _, start, end = write
            plan.copies += memory.reserve(write)
            candidates = request.live if self._forking(request) else [seq]
            samples = [s for s in candidates if len(s.tokens) == end]
            # No further than it is in use: some managers' tables are as long as the sequence may ever get.
            table = memory.tables[seq.seq_id][: memory.blocks_for(end)]
            plan.chunks.append(Chunk(request, seq, start, end - start, samples, table))

    def _resume(self, plan: StepPlan) -> None:
        """Swapped → running, in order of arrival, each with the blocks for its next tokens too."""
        while self.swapped:
            request = self.swapped[0]
            writes = [
                Write(seq.seq_id, seq.num_computed, min(seq.num_computed + 1, len(seq.tokens)))
                for seq in request.live
                if seq.seq_id in self.memory.swapped
            ]
            num_seqs = sum(r.width for r in self.running) + request.width
            budget = self.max_num_batched_tokens - plan.num_tokens
            if num_seqs > self._seats(request) or len(writes) > budget:
                return
            needed = self.memory.blocks_needed_to_swap_in(writes)
            if needed > self.memory.pool.num_free - self._owed_to_running() - self._growth():
                if self.running:
                    return
                self._outgrow(request, plan)  # alone, and still too large
                continue
            self.swapped.remove(request)
            self._queue(request, self.running, Status.RUNNING)
            self.events.emit(Resumed, request.request_id)
            plan.swap_ins += self.memory.swap_in([write.seq_id for write in writes])
            counts = {s.seq_id: min(1, self._target(request, s) - s.num_computed) for s in self._active(request)}
            self._place(request, self._writes(request, counts), plan)

    def _admit(self, plan: StepPlan) -> None:
        """Waiting → running, in order of arrival, as long as tokens, sequences and blocks allow."""
        if not self.waiting or (self.static_batching and self.running):
            return
        budget = self.max_num_batched_tokens - plan.num_tokens
        num_seqs = sum(request.width for request in self.running)
        owed = self._owed_to_running()  # kept up to date here: to count anew for each would take time squared
        # A static batch takes all it can hold at once, tokens or not: the next chance is far away.
        while self.waiting and (budget > 0 or self.static_batching):
            request = self.waiting[0]
            if num_seqs + request.width > self._seats(request) or not self._fits(request, plan, owed):
                break
            if request.status is Status.FINISHED:
                continue  # it had outgrown the pool and `_fits` ended it
            del self.waiting[0]
            num_seqs += request.width
            self._queue(request, self.running, Status.RUNNING)
            lead, hits = request.live[0], self._hits(request)
            lead.num_computed = len(hits) * self.memory.block_size
            self.events.emit(Admitted, request.request_id, lead.seq_id, lead.num_computed)
            self.memory.open(lead.seq_id, hits, self.demand(request))
            counts = self._spend(budget, [request])
            budget -= counts[lead.seq_id]
            self._place(request, self._writes(request, counts), plan)
            owed += self._owed(request)

    def _seats(self, request: Request) -> float:
        """How many sequences may run when this request has joined."""
        return self.max_num_seqs

    def _queue(self, request: Request, queue: list[Request], status: Status) -> None:
        insort(queue, request, key=lambda r: r.arrival)
        request.status = status

    def _hits(self, request: Request) -> list:
        if request.prompt_logprobs is not None:
            return []  # a cached block has keys and values, but the logits are wanted too
        return self.memory.match(request.live[0].tokens[: request.fork_at])

    def _fits(self, request: Request, plan: StepPlan, owed: int) -> bool:
        """Whether the pool can hold the request beside the ``owed`` blocks that running ones' known tokens need."""
        request.fork_at = _common_prefix(request.live)
        if self.memory.reserves_ahead:
            return self.memory.fits(self.demand(request))  # whoever runs has all it will ever need
        in_use = sum(self.memory.pool.ref_counts[hit.block] > 0 for hit in self._hits(request))
        free = self.memory.pool.num_free - owed
        if any(seq.num_output for seq in request.live):  # it was preempted
            free -= self._growth()
        while self.blocks_to_hold(request) - in_use > free:
            if self.running:
                return False
            # Alone in the pool and still too large: it came back from preemption longer than the pool is.
            self._outgrow(request, plan)
            if request.status is Status.FINISHED:
                break
        return True

    def _growth(self) -> int:
        """A block for each running sequence: a victim that comes back before they could grow is soon out again."""
        return sum(len(self._active(request)) for request in self.running)

    def _owed_to_running(self) -> int:
        return sum(map(self._owed, self.running))

    def _owed(self, request: Request) -> int:
        """Blocks that a running request's prompt, computed in chunks, has yet to take."""
        active = self._active(request)
        if self._forking(request):
            return self.blocks_to_hold(request) - len(self.memory.tables[active[0].seq_id])
        return sum(
            max(0, self.memory.blocks_for(len(seq.tokens)) - len(self.memory.tables[seq.seq_id])) for seq in active
        )

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """All or nothing: every sequence of the request gives up its blocks (paper §4.5)."""
        self.running.remove(victim)
        plan.preempted.append(victim)
        self.num_preemptions += 1
        active = self._active(victim)
        seq_ids = [seq.seq_id for seq in active]
        if self.memory.can_swap_out(seq_ids):
            self._queue(victim, self.swapped, Status.SWAPPED)
            self.events.emit(Preempted, victim.request_id, "swap", "no free block")
            plan.swap_outs += self.memory.swap_out(seq_ids)
            return
        self._queue(victim, self.waiting, Status.WAITING)
        self.events.emit(Preempted, victim.request_id, "recompute", "no free block")
        for seq in active:
            self.memory.free(seq.seq_id)
            seq.num_computed = 0

    def _outgrow(self, request: Request, plan: StepPlan) -> None:
        """The request has the pool to itself and needs more: its last sequence ends where it is (beams: all do)."""
        plan.outgrown.append(request)
        if request.beams:
            self._end_search(request, "length")
        else:
            self._finish(request, request.live[-1], "length")

    # --- applying ---------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, sampled: Seq[SampledToken | None]) -> list[Request]:
        """Applies a step's results: KV is in place, tokens are appended, forks made, finished sequences freed.

        ``sampled`` has an entry for each of ``plan.samples``, ``None`` behind a draft's first wrong token. Returns the
        requests that got a token or lost a sequence.
        """
        watched = self.events.active
        for chunk in plan.chunks:
            seq, request = chunk.seq, chunk.request
            known = chunk.num_tokens - len(chunk.draft)
            seq.num_computed += known
            if watched:
                if chunk.draft:
                    self.events.emit(Proposed, seq.seq_id, list(chunk.draft), [_piece(seq, t) for t in chunk.draft])
                self.events.emit(Filled, seq.seq_id, chunk.start, known)
            self.memory.computed(seq.seq_id, seq.tokens, seq.num_computed)
            if seq.num_computed == request.fork_at and self._forking(request):
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
            if request.beams:
                self._advance_beams(request, row)
            else:
                for seq, token in row:
                    if seq.finish_reason is None:  # else a token of the draft before has ended it
                        self._append(request, seq, token)
            if self.speculation:
                self.speculation.settle(request, self)
        self.step += 1
        return list(dict.fromkeys([*plan.outgrown, *rows]))

    def abort(self, request: Request) -> None:
        """Ends a request in whatever state it is; every block comes back."""
        if request.beams and request.live:
            self._end_search(request, "abort")
        for seq in list(request.live):
            self._finish(request, seq, "abort")

    def fork(self, parent: Request, child: Request) -> None:
        """Starts ``child``, a copy of a running request with one sequence, on the parent's blocks."""
        (old,), (new,) = parent.live, child.live
        self._queue(child, self.running, Status.RUNNING)
        self.events.emit(Forked, old.seq_id, new.seq_id, child.request_id)
        self.memory.fork(old.seq_id, new.seq_id)

    def check(self) -> None:
        """Invariants across the room. Raises `InvariantViolation`."""
        active = {seq.seq_id: seq.num_computed for request in self.running for seq in self._active(request)}
        swapped = {seq.seq_id for request in self.swapped for seq in request.live}
        if set(active) != set(self.memory.tables) or not set(self.memory.swapped) <= swapped:
            raise InvariantViolation(f"block tables of {set(self.memory.tables)} for the running {set(active)}")
        self.memory.check(active)
        if sum(request.width for request in self.running) > self.max_num_seqs:
            raise InvariantViolation("more sequences run than max_num_seqs allows")
        for queue in (self.waiting, self.running, self.swapped):
            if [r.arrival for r in queue] != sorted(r.arrival for r in queue):
                raise InvariantViolation("a queue is out of the order of arrival")

    def _append(self, request: Request, seq: Sequence, token: SampledToken) -> None:
        """The sequence takes its token, and ends if that token, its text or its length says so."""
        reason = "stop" if token.token_id in request.stop_token_ids else None
        if reason is None and seq.num_output + 1 >= request.max_output:
            reason = "length"
        reason = self._take(request, seq, token, reason)
        if reason:
            self._finish(request, seq, reason)

    def _take(self, request: Request, seq: Sequence, token: SampledToken, reason: str | None) -> str | None:
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
            if reason != "stop":  # the text of a token that ends the sequence is not shown
                text = seq.text.push(token.token_id)
                reason = "stop" if seq.text.stopped is not None else reason
            if reason and seq.text.stopped is None:
                text += seq.text.finish()
        if self.events.active:
            alternatives = [[token_id, _piece(seq, token_id), value] for token_id, value in top]
            self.events.emit(Sampled, seq.seq_id, token.token_id, text, logprob, alternatives)
        return reason

    def _finish(self, request: Request, seq: Sequence, reason: str) -> None:
        if seq.seq_id in self.memory.tables or seq.seq_id in self.memory.swapped:
            self.memory.free(seq.seq_id)
        if seq.text is not None:
            seq.text.finish()  # what it held back belongs to the output too
        request.end(seq, reason)
        self.events.emit(Finished, seq.seq_id, reason)
        if not request.live and request.status is not Status.FINISHED:
            queues = {Status.RUNNING: self.running, Status.SWAPPED: self.swapped, Status.WAITING: self.waiting}
            queues[request.status].remove(request)
            request.status = Status.FINISHED

    # --- beams ------------------------------------------------------------------------------------------------

    def _advance_beams(self, request: Request, rows: list[tuple[Sequence, SampledToken]]) -> None:
        """One token for every beam: good ones fork, hopeless ones are freed, finished ones are kept aside."""
        search = request.beams
        assert search is not None
        length = rows[0][0].num_output + 1
        live, ended = search.choose(rows, request.max_output)
        for c in ended:
            search.add(c.score, self._continue(request, c))
        heirs = Counter(c.parent.seq_id for c in live)
        beams = []
        for c in live:
            heirs[c.parent.seq_id] -= 1
            # All but a parent's last continuation fork off it; the last one happens in place.
            beams.append(self._continue(request, c, in_place=heirs[c.parent.seq_id] == 0))
        request.set_seqs(beams)
        for seq, _ in rows:
            if seq.seq_id not in heirs:
                self._finish(request, seq, "pruned")
        search.update_done(live, length, request.max_output)
        if search.done:
            self._end_search(request, None)

    def _continue(self, request: Request, c: Continuation, in_place: bool = False) -> Sequence:
        """The continuation's parent, or a fork of it, that has taken the token; what ends there needs no blocks."""
        seq = c.parent
        if not in_place:
            seq = c.parent.copy(self.next_seq_id())
            self.events.emit(Forked, c.parent.seq_id, seq.seq_id, request.request_id)
            if not c.ends:
                self.memory.fork(c.parent.seq_id, seq.seq_id)
        self._take(request, seq, c.token, c.ends)
        if c.ends:
            seq.finish_reason = c.ends
            self.events.emit(Finished, seq.seq_id, c.ends)
        return seq

    def _end_search(self, request: Request, reason: str | None) -> None:
        """Leaves the best n hypotheses. With a reason the search was cut short, and live beams are hypotheses too."""
        search = request.beams
        assert search is not None
        for seq in list(request.live):
            if reason:
                search.add(seq.cumulative_logprob, seq)
            self._finish(request, seq, reason or "pruned")
        request.set_seqs([seq for _, seq in search.finished[: request.params.n]])


def _piece(seq: Sequence, token_id: int) -> str:
    """The text of a token by itself, for those who watch."""
    return seq.text.piece(token_id) if seq.text is not None else f"<{token_id}>"


def _common_prefix(seqs: list[Sequence]) -> int:
    """How many tokens all of the sequences agree on."""
    first = seqs[0].tokens
    length = min(len(seq.tokens) for seq in seqs)
    for seq in seqs[1:]:
        length = next((i for i in range(length) if seq.tokens[i] != first[i]), length)
    return length
