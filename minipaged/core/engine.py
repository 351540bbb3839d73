"""The engine: requests in, one step at a time, tokens out."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from numbers import Integral
from random import Random
from typing import Any

from minipaged.core.block_table import BlockTables, Demand
from minipaged.core.params import CoreConfig, SamplingParams
from minipaged.core.plan import SampledToken, StepPlan
from minipaged.core.request import Request, Sequence
from minipaged.core.scheduler import Scheduler, piece
from minipaged.core.seams import FCFS, AdmissionPolicy, Decoding, MemoryManager, Runner, Sampling, Stage
from minipaged.errors import InvalidConfig, InvalidRequest, StepFailed, same_process, unicode_text  # typed errors
from minipaged.events import EngineError, EngineStarted, EventLog, RequestAdded, StepFinished, StepStarted  # events
from minipaged.events.waste import Held, held_now  # Held: slots by class of waste (paper, Fig. 2)
from minipaged.outputs import RequestOutput, output_of  # what callers get back: plain data


@dataclass(frozen=True)
class Wings:
    """Factories of features (*wings*), which `minipaged.build` plugs into three places (*seams*) of `core.seams`.

    ``config``: the settings that these features know. ``add_batch`` and ``fork``: what those methods of `Engine` do.
    """

    config: type[CoreConfig] = CoreConfig
    admission: Callable[[], AdmissionPolicy] = FCFS
    stages: Callable[[], Seq[Stage]] = list
    decoding: Callable[[SamplingParams, frozenset[int]], Decoding] = Sampling
    add_batch: Callable[..., int] | None = None
    fork: Callable[..., str] | None = None


def paged(config: Any, events: EventLog) -> BlockTables:
    """The heart's memory manager for a `CoreConfig`."""
    return BlockTables(config.num_blocks, config.block_size, events, config.caches_prefixes)


class Engine:
    """Continuous batching over a paged KV cache. Not thread-safe: one thread calls it.

    ``config`` must have numbers for its sizes. ``sampler(logits, plan)`` returns a token, or an error, for each of
    ``plan.samples``; its method ``check(params)``, if any, raises `InvalidRequest` for parameters that it refuses.
    ``make_text(prompt, stops)`` makes a `text.TextStream`. ``tokenizer`` and ``bytes_per_block`` are for callers.
    """

    def __init__(
        self,
        config: CoreConfig,
        runner: Runner,
        sampler: Callable[[Any, StepPlan], Seq[SampledToken | None]],
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: Any = None,
        bytes_per_block: int = 0,
        make_text: Callable[[list[int], Seq[str]], Any] | None = None,
        make_memory: Callable[[Any, EventLog], MemoryManager] = paged,
        make_scheduler: Callable[..., Scheduler] = Scheduler,
        wings: Wings = Wings(),  # noqa: B008  (it is frozen)
    ) -> None:
        if config.num_blocks is None or config.max_model_len is None or config.block_size is None:
            raise InvalidConfig("an engine needs num_blocks, block_size and max_model_len as numbers")
        if type(config) is not wings.config:
            raise InvalidConfig(f"a {type(config).__name__} asks for features: let minipaged.build make the engine")
        self.config: Any = config
        self.num_blocks, self.max_model_len = config.num_blocks, config.max_model_len
        self.runner, self.sampler, self.tokenizer = runner, sampler, tokenizer
        self.vocab_size, self.bytes_per_block, self.eos_token_ids = vocab_size, bytes_per_block, eos_token_ids
        self.make_text, self.make_memory, self.make_scheduler = make_text, make_memory, make_scheduler
        self.wings, self.events = wings, EventLog()
        self.memory: MemoryManager = make_memory(config, self.events)
        self.scheduler = make_scheduler(
            self.memory,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            events=self.events,
            admission=wings.admission(),
            stages=wings.stages(),
        )
        self.requests: dict[str, Request] = {}
        self.next_arrival = count().__next__
        self._busy, self._pid, self.num_forks = False, os.getpid(), 0  # features.fork_by_hand numbers forks
        self._random = Random(config.seed)

    def step(self) -> list[RequestOutput]:
        """Computes one step; returns the requests that got a token or lost a sequence.

        Raises `StepFailed` if the runner or the sampler raised. The requests that it was computing are then aborted and
        their blocks free again; the others go on with the next step.
        """
        with self._exclusive():
            if not self.has_unfinished():
                return []
            started = time.perf_counter()
            self.events.emit(StepStarted, self.scheduler.step)
            plan = self.scheduler.schedule()
            try:
                logits = self.runner.execute(plan)  # also without chunks: a plan may have swaps alone
                tokens = self.sampler(logits, plan) if plan.chunks else []
            except BaseException as error:
                self.give_up(plan, error)
                raise  # `give_up` raises StepFailed; only Ctrl-C and its kind get here
            requests = self.scheduler.commit(plan, tokens)
            self.events.emit(StepFinished, plan.step, plan.num_tokens, time.perf_counter() - started)
            return self._outputs(requests)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams | None = None,
        *,
        prompt: str | None = None,
    ) -> None:
        """Queues a request. ``prompt`` is only carried along to the output.

        Raises `InvalidRequest` for one that can never be served; nothing has changed then.
        """
        params = params or SamplingParams()
        unicode_text(prompt or "", "prompt")
        with self._exclusive():
            tokens = self.check_request(request_id, prompt_token_ids, params)
            self.enqueue(request_id, tokens, params, prompt)

    def add_batch(self, batch: list[Any], grouping: Callable[..., Any] | None = None) -> int:
        """Queues requests in groups that share a prefix: see `features.batchllm.groups.add_batch`."""
        if self.wings.add_batch is None:
            raise InvalidConfig("this engine was built without features.batchllm, which serves batches in groups")
        with self._exclusive():
            return self.wings.add_batch(self, batch, *([grouping] if grouping else []))

    def fork(self, request_id: str, new_id: str | None = None) -> str:
        """Copies a running request, which continues twice from here; returns the id of the copy.

        See `features.fork_by_hand`. Raises `InvalidRequest` for a request that cannot be forked now.
        """
        if self.wings.fork is None:
            raise InvalidRequest("this engine was built without features.fork_by_hand")
        with self._exclusive():
            return self.wings.fork(self, request_id, new_id)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request in whatever state it is; its blocks are free when this returns its last output.

        Returns ``None`` for a request that is unknown or finished already: aborting twice is fine.
        """
        with self._exclusive():
            request = self.requests.get(request_id)
            if request is None:
                return None
            self.scheduler.abort(request)
            return self._outputs([request])[0]

    def check_request(self, request_id: str, token_ids: list[int], params: SamplingParams) -> list[int]:
        """Checks a request as `add_request` does, and changes nothing. Returns the prompt as a list of ints."""
        self.check_id(request_id)
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params must be a SamplingParams, not {type(params).__name__}")
        if not isinstance(token_ids, (list, tuple)) or not token_ids:
            raise InvalidRequest(f"the prompt is empty or no list: {token_ids!r:.80}; give a list of token ids")
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"token id {token!r} is not a whole number from 0 to {self.vocab_size - 1}")
        if len(token_ids) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens, but a sequence can have {self.max_model_len} at most "
                "and needs room for one more; shorten it"
            )
        if params.stop and self.make_text is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model came without one; use stop_token_ids")
        self.wings.decoding(params, frozenset())  # raises for a way of decoding that this engine does not have
        getattr(self.sampler, "check", lambda params: None)(params)
        if unread := set(params.extra_args) - getattr(self.scheduler.admission, "extra_args", frozenset()):
            raise InvalidRequest(f"extra_args: the admission policy does not read {', '.join(map(repr, unread))}")
        name, width = ("beam_width", params.beam_width) if params.beam_width else ("n", params.n)
        if width > self.config.max_num_seqs:
            raise InvalidRequest(f"{name} is {width}, but max_num_seqs = {self.config.max_num_seqs} is the limit")
        if strange := [token for token in (*params.logit_bias, *params.stop_token_ids) if token >= self.vocab_size]:
            raise InvalidRequest(f"token id {strange[0]} of logit_bias or stop_token_ids is not in the vocabulary")
        num = len(token_ids)  # at arrival every sequence equals the prompt
        demand = Demand([num] * width, common=num, num_prompt=num, max_output=self.max_output(token_ids, params))
        if refusal := self.memory.refusal(demand):
            raise InvalidRequest(refusal)
        return [int(token) for token in token_ids]

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def is_unfinished(self, request_id: str) -> bool:
        return request_id in self.requests

    def block_tables(self) -> dict[int, list[int]]:
        """A copy of every block table: sequence id → physical blocks in logical order."""
        return {seq_id: list(table) for seq_id, table in self.memory.tables.items()}

    def held(self) -> Held:
        """The pool's slots by class of waste, now (paper §3.1); the rest of ``num_blocks`` · ``block_size`` is free."""
        return held_now(self)

    def started_event(self) -> EngineStarted:
        """The header of a recording. Listeners come and go, so a recorder asks for it."""
        return EngineStarted.of(self.config, self.bytes_per_block)

    def check(self) -> None:
        """Raises `InvariantViolation` if the bookkeeping is inconsistent. For tests, after every step."""
        self.scheduler.check()

    def enqueue(self, request_id: str, tokens: list[int], params: SamplingParams, prompt: str | None) -> Request:
        """Queues a request that `check_request` has let through."""
        request = self._request(request_id, tokens, params, prompt)
        self.scheduler.add(request)
        self.requests[request_id] = request
        if self.events.active:
            seq_ids, lead = [seq.seq_id for seq in request.seqs], request.seqs[0]
            pieces = [piece(lead, token) for token in tokens]
            self.events.emit(
                RequestAdded, request_id, seq_ids, tokens, pieces, request.max_output, request.rank or None
            )
        return request

    def max_output(self, prompt: list[int], params: SamplingParams) -> int:
        """Tokens that each sequence may generate."""
        room = self.max_model_len - len(prompt)
        return min(params.max_tokens or room, room)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Rejects re-entrant changes, for example from a subscriber of events: they would corrupt both changes."""
        same_process(self._pid, "engine")
        if self._busy:
            raise RuntimeError("the engine is in the midst of a change; subscribers may watch, and act when it is over")
        self._busy, collecting = True, gc.isenabled()
        gc.disable()  # a step makes thousands of objects and no cycle among them; the collector would double its time
        try:
            yield
        finally:
            self._busy = False
            if collecting:
                gc.enable()
            self.events.warn_of_failures()  # of subscribers: these never fail a step

    def check_id(self, request_id: str) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequest(f"request_id must be a string that is not empty, not {request_id!r}")
        unicode_text(request_id, "request_id")
        if request_id in self.requests:
            raise InvalidRequest(f"a request {request_id!r} is running already; give each its own id")

    def _request(self, request_id: str, tokens: list[int], params: SamplingParams, prompt: str | None) -> Request:
        """A request and its sequences, each with a random generator of its own."""
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        decoding, seed = self.wings.decoding(params, stop_ids), self.seed(params)
        # A string seeds Random by its SHA-512, so that neighbouring seeds and sequences have nothing in common.
        rngs = [Random(f"{seed}/{branch}") for branch in range(decoding.streams)]
        seqs = [Sequence(self.scheduler.next_seq_id(), list(tokens), len(tokens), rng) for rng in rngs]
        if self.make_text is not None:
            for seq in seqs:
                seq.text = self.make_text(tokens, params.stop)
        return Request(
            request_id,
            tokens,
            params,
            seqs,
            stop_ids,
            max_output=self.max_output(tokens, params),
            arrival=self.next_arrival(),
            decoding=decoding,
            prompt=prompt,
            fork_at=len(tokens),
            prompt_logprobs=[None] * len(tokens) if params.prompt_logprobs is not None else None,
        )

    def seed(self, params: SamplingParams) -> int:
        return params.seed if params.seed is not None else self._random.getrandbits(64)

    def _outputs(self, requests: list[Request]) -> list[RequestOutput]:
        outputs = [output_of(request) for request in requests]
        for output in outputs:
            if output.finished:
                del self.requests[output.request_id]
        return outputs

    def give_up(self, plan: StepPlan, error: BaseException) -> None:
        """A step failed midway: copies may be missing, KV half written. Aborts the plan's requests."""
        kept = [request for stage in self.scheduler.stages for request in stage.failed(plan)]
        requests = list(dict.fromkeys([*(chunk.request for chunk in plan.chunks), *plan.outgrown, *kept]))
        message = f"step {plan.step} failed: {type(error).__name__}: {error}"
        self.events.emit(EngineError, message)
        failure = StepFailed(f"{message}; aborted: {', '.join(request.request_id for request in requests)}")
        for request in requests:
            request.error = failure
            self.scheduler.abort(request)
        failure.outputs = self._outputs(requests)
        self.scheduler.step += 1
        if isinstance(error, Exception):
            raise failure from error
        error.outputs = failure.outputs  # type: ignore[attr-defined]  # Ctrl-C: the caller tells those who wait for them
