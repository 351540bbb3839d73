"""The engine: requests in, one step at a time, tokens out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import count
from numbers import Integral
from random import Random
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from minipaged.config import EngineConfig, SamplingParams
from minipaged.errors import InvalidConfig, InvalidRequest, StepFailed
from minipaged.events import EngineError, EngineStarted, EventLog, RequestAdded, StepFinished, StepStarted
from minipaged.memory.managers import MemoryManager, make_manager
from minipaged.memory.table import Demand
from minipaged.memory.waste import Held, Moment
from minipaged.outputs import RequestOutput
from minipaged.request import Request, Sequence, Status
from minipaged.scheduling import batchllm
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.groups import BatchScheduler
from minipaged.scheduling.plan import SampledToken, StepPlan
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.speculative import make_speculation


class BatchItem(NamedTuple):
    """A request of a batch, as `Engine.add_request` takes it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None


class Runner(Protocol):
    """Executes plans. `execution.runner.ModelRunner` does it with a model; a test or simulator may do without."""

    def execute(self, plan: StepPlan) -> Any:
        """Runs the plan's swaps, copies and chunks, of which there may be none.

        Returns logits [R, vocab], a row for each chunk that samples, and one more for each token of its draft.
        """


P = ParamSpec("P")
R = TypeVar("R")


def _undisturbed(method: Callable[Concatenate[Engine, P], R]) -> Callable[Concatenate[Engine, P], R]:
    """Of what changes the engine one thing is done at a time: a subscriber that began another would corrupt both."""

    @wraps(method)
    def alone(self: Engine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._busy:
            raise RuntimeError("the engine is in the midst of a change; subscribers may watch, and act when it is over")
        self._busy = True
        try:
            return method(self, *args, **kwargs)
        finally:
            self._busy = False
            self.events.warn_of_failures()

    return alone


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A step makes thousands of small objects and no cycle among them; looking for one doubles the time it takes."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Engine:
    """Continuous batching over a paged KV cache.

    ``config.num_blocks`` and ``config.max_model_len`` must be numbers here; `LLM` works them out from the model and
    the memory there is. Not thread-safe: one thread calls it.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        sampler: Callable[[Any, StepPlan], Seq[SampledToken | None]],
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: Any = None,
        bytes_per_block: int = 0,
        make_memory: Callable[[EngineConfig, EventLog], MemoryManager] = make_manager,
        make_scheduler: Callable[..., Scheduler] = BatchScheduler,
    ) -> None:
        assert config.num_blocks is not None and config.max_model_len is not None
        self.config, self.num_blocks, self.max_model_len = config, config.num_blocks, config.max_model_len
        self.swap_blocks = config.swap_space(config.num_blocks)
        self.enable_prefix_caching = config.caches_prefixes
        self.runner, self.sampler, self.tokenizer = runner, sampler, tokenizer
        self.vocab_size, self.bytes_per_block, self.eos_token_ids = vocab_size, bytes_per_block, eos_token_ids
        self.events = EventLog()
        self.make_memory, self.make_scheduler = make_memory, make_scheduler  # the labs bring their own
        self.memory: MemoryManager = make_memory(config, self.events)
        self.scheduler = make_scheduler(
            self.memory,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            static_batching=config.batching == "static",
            events=self.events,
            speculation=make_speculation(config),
        )
        self._requests: dict[str, Request] = {}
        self._arrivals = count()
        self._forks = count(1)
        self._busy = False
        self._random = Random(config.seed)

    @_undisturbed
    @_no_garbage_collection()
    def step(self) -> list[RequestOutput]:
        """Computes one step; returns the requests that got a token or ended in it.

        Raises `StepFailed` if the step itself raised. The requests it was computing are aborted then and their blocks
        free again; the others go on with the next step.
        """
        if not self.has_unfinished():
            return []
        started = time.perf_counter()
        self.events.emit(StepStarted, self.scheduler.step)
        plan = self.scheduler.schedule()
        try:
            logits = self.runner.execute(plan)  # without chunks too: a step may do nothing but swap out
            tokens = self.sampler(logits, plan) if plan.chunks else []
        except BaseException as error:
            self._give_up(plan, error)
            raise
        requests = self.scheduler.commit(plan, tokens)
        self.events.emit(StepFinished, plan.step, plan.num_tokens, time.perf_counter() - started)
        return self._outputs(requests)

    @_undisturbed
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
        self._add(request_id, self.check_request(request_id, prompt_token_ids, params), params, prompt)

    @_undisturbed
    def add_batch(self, batch: list[BatchItem], plan: Callable[..., batchllm.Plan] = batchllm.plan) -> int:
        """Queues requests in groups of those that begin alike, as BatchLLM does; ``plan`` makes the groups.

        What a group shares is computed once, and kept until all of it have ended. Memory alone limits how many of a
        batch run. Tokens are those of `add_request` for one after the other. Returns how many tokens of prompts need
        not be computed: exactly so many, unless a request is aborted, ends at the pool's limit, or needs the pool for
        itself alone. Raises `InvalidConfig` for an engine that shares no blocks, `InvalidRequest` if any request cannot
        be served: nothing has changed then.
        """
        self.config.check_schedule("batchllm")
        scheduler = self.scheduler
        if not isinstance(scheduler, BatchScheduler):
            raise InvalidConfig(f'schedule="batchllm" needs a BatchScheduler, not {type(scheduler).__name__}')
        prompts = [self.check_request(*item[:3]) for item in batch]
        if len({item.request_id for item in batch}) < len(batch):
            raise InvalidRequest("two requests of the batch have the same id; give each its own")
        # Drawn in the order of the batch, so that no seed depends on the schedule.
        params = [self._seeded(item.params) for item in batch]
        outputs = [self._max_output(len(prompt), one) * one.n for prompt, one in zip(prompts, params, strict=True)]
        # With all logits asked for nothing is shared: such a prompt begins with a token that nobody else has.
        shared = [
            prompt if one.prompt_logprobs is None else [-1 - index, *prompt[1:]]
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
        planned = plan(shared, outputs, self.memory.block_size)
        for group in planned.groups:
            requests = [self._add(batch[i].request_id, prompts[i], params[i], batch[i].prompt) for i in group.members]
            scheduler.group(requests, group.num_blocks)
        return planned.saved_tokens

    @_undisturbed
    def fork(self, request_id: str, new_id: str | None = None) -> str:
        """Lets a running request take a second way from here on: returns the id of its copy.

        All blocks are shared until one of the two writes (paper §4.4, ``fork``). The copy inherits the output so far
        and draws its own random numbers. Raises `InvalidRequest` for a request that is not running with exactly one
        sequence past its prompt, when ``max_num_seqs`` are running already, or when memory must be set aside for the
        copy and there is too little. Whoever forks steps the engine too: an `LLM` knows nothing of the copy.
        """
        parent = self._requests.get(request_id)
        if parent is None or parent.status is not Status.RUNNING or parent.beams or len(parent.live) != 1:
            raise InvalidRequest(f"{request_id!r} is not a running request with one sequence; only such can be forked")
        (seq,) = parent.live
        if seq.num_output == 0 or seq.num_computed < len(seq.tokens) - 1:
            raise InvalidRequest(f"{request_id!r} is still computing what it knows; fork it when it generates")
        if sum(request.width for request in self.scheduler.running) >= self.config.max_num_seqs:
            raise InvalidRequest(f"max_num_seqs = {self.config.max_num_seqs} sequences are running; fork again later")
        if new_id is None:
            new_id = f"{request_id}/fork-{next(self._forks)}"  # never twice, so that no two copies draw alike
        self._check_id(new_id)
        if not self.memory.prepare_fork(seq.seq_id):
            raise InvalidRequest(f"there is no room for a copy of {request_id!r}; fork again when others have ended")
        params = replace(parent.params, n=1)
        seed = params.seed if params.seed is not None else self._random.getrandbits(64)
        child = seq.copy(self.scheduler.next_seq_id(), Random(f"{seed}/{new_id}"))
        request = self._request(new_id, parent.prompt_token_ids, params, [child], parent.prompt)
        if parent.prompt_logprobs is not None:
            request.prompt_logprobs = list(parent.prompt_logprobs)
        self.scheduler.fork(parent, request)
        self._requests[new_id] = request
        return new_id

    @_undisturbed
    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request in whatever state it is; its blocks are free when this returns.

        Returns its last output, or ``None`` for a request that is unknown or finished already: aborting twice is fine.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self.scheduler.abort(request)
        (output,) = self._outputs([request])
        return output

    def check_request(self, request_id: str, token_ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt as `add_request` takes it. Raises what that would raise, and changes nothing."""
        self._check_id(request_id)
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params must be a SamplingParams, not {type(params).__name__}")
        tokens = list(token_ids)
        if not tokens:
            raise InvalidRequest("the prompt is empty; give at least one token")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"token id {token!r} is not a whole number from 0 to {self.vocab_size - 1}")
        if len(tokens) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens, but a sequence can have {self.max_model_len} at most "
                "and needs room for one more; shorten it"
            )
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model came without one; use stop_token_ids")
        width = params.beam_width or params.n
        if width > self.config.max_num_seqs:
            name = "beam_width" if params.beam_width else "n"
            raise InvalidRequest(
                f"{name} is {width}, but at most max_num_seqs = {self.config.max_num_seqs} sequences run at once"
            )
        for token in [*params.logit_bias, *params.stop_token_ids]:
            if token >= self.vocab_size:
                raise InvalidRequest(f"token id {token} of logit_bias or stop_token_ids is not in the vocabulary")
        demand = Demand([len(tokens)] * width, len(tokens), len(tokens), self._max_output(len(tokens), params))
        refusal = self.memory.refusal(demand)
        if refusal is not None:
            raise InvalidRequest(refusal)
        return [int(token) for token in tokens]

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def is_unfinished(self, request_id: str) -> bool:
        return request_id in self._requests

    def block_tables(self) -> dict[int, list[int]]:
        """A copy of every block table: sequence id → physical blocks in logical order."""
        return {seq_id: list(table) for seq_id, table in self.memory.tables.items()}

    def held(self) -> Held:
        """The pool's slots by class of waste, now; what is left of its ``num_blocks`` · ``block_size`` is free.

        A sequence is taken to generate all that its request allows. While the next request fits nowhere, what a
        contiguous manager has free counts as *external*: holes that are of no use to anybody (paper §3.1).
        """
        scheduler, memory = self.scheduler, self.memory
        held = memory.held(
            Moment(seq.seq_id, seq.num_prompt, seq.num_computed, seq.num_prompt + request.max_output - 1)
            for request in scheduler.running
            for seq in request.live
            if seq.seq_id in memory.tables
        )
        if memory.reserves_ahead and scheduler.waiting and not memory.fits(scheduler.demand(scheduler.waiting[0])):
            return held._replace(external=self.num_blocks * memory.block_size - sum(held[:3]))
        return held

    def started_event(self) -> EngineStarted:
        """The header of a recording. Listeners come and go, so whoever records asks for it."""
        config = self.config
        return EngineStarted(
            config.model,
            self.memory.block_size,
            self.num_blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.max_model_len,
            self.enable_prefix_caching,
            config.preemption,
            self.swap_blocks,
            self.bytes_per_block,
            config.memory,
            config.batching,
        )

    def check(self) -> None:
        """Raises `InvariantViolation` if the bookkeeping is inconsistent. For tests, after every step."""
        self.scheduler.check()

    def _add(self, request_id: str, tokens: list[int], params: SamplingParams, prompt: str | None) -> Request:
        seqs = [
            Sequence(self.scheduler.next_seq_id(), list(tokens), len(tokens), rng) for rng in self._generators(params)
        ]
        if self.tokenizer is not None:
            from minipaged.text import TextStream  # not at the top: the engine runs without a tokenizer too

            for seq in seqs:
                seq.text = TextStream(self.tokenizer, tokens, params.stop)
        request = self._request(request_id, tokens, params, seqs, prompt)
        self.scheduler.add(request)
        self._requests[request_id] = request
        if self.events.active:
            seq_ids = [seq.seq_id for seq in seqs]
            self.events.emit(RequestAdded, request_id, seq_ids, tokens, self._pieces(tokens), request.max_output)
        return request

    def _check_id(self, request_id: str) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequest(f"request_id must be a string that is not empty, not {request_id!r}")
        if request_id in self._requests:
            raise InvalidRequest(f"a request {request_id!r} is running already; give each its own id")

    def _request(
        self, request_id: str, tokens: list[int], params: SamplingParams, seqs: list[Sequence], prompt: str | None
    ) -> Request:
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        return Request(
            request_id,
            tokens,
            params,
            seqs,
            stop_ids,
            max_output=self._max_output(len(tokens), params),
            arrival=next(self._arrivals),
            prompt=prompt,
            beams=BeamSearch(params, stop_ids) if params.beam_width else None,
            fork_at=len(tokens),
            prompt_logprobs=[None] * len(tokens) if params.prompt_logprobs is not None else None,
        )

    def _generators(self, params: SamplingParams) -> list[Random]:
        """A generator per sequence. A beam search draws nothing, and starts as one sequence."""
        seed = params.seed if params.seed is not None else self._random.getrandbits(64)
        # A string seeds Random by its SHA-512, so that neighbouring seeds and branches have nothing in common.
        return [Random(f"{seed}/{branch}") for branch in range(1 if params.beam_width else params.n)]

    def _seeded(self, params: SamplingParams) -> SamplingParams:
        """With a seed; drawn as `_generators` would draw it."""
        return params if params.seed is not None else replace(params, seed=self._random.getrandbits(64))

    def _max_output(self, num_prompt: int, params: SamplingParams) -> int:
        room = self.max_model_len - num_prompt
        return min(params.max_tokens or room, room)

    def _pieces(self, tokens: list[int]) -> list[str]:
        """The text of each token, for those who watch."""
        return [self.tokenizer.decode([token]) if self.tokenizer is not None else f"<{token}>" for token in tokens]

    def _outputs(self, requests: list[Request]) -> list[RequestOutput]:
        outputs = [request.output() for request in requests]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    def _give_up(self, plan: StepPlan, error: BaseException) -> None:
        """A step failed midway: copies may be missing, KV half written. Nothing that it touched may live on."""
        swapped_out = [request for request in plan.preempted if request.status is Status.SWAPPED]
        requests = list(dict.fromkeys([*(chunk.request for chunk in plan.chunks), *plan.outgrown, *swapped_out]))
        message = f"step {plan.step} failed: {type(error).__name__}: {error}"
        self.events.emit(EngineError, message)
        for request in requests:
            self.scheduler.abort(request)
        outputs = self._outputs(requests)
        self.scheduler.step += 1
        if isinstance(error, Exception):
            ids = ", ".join(request.request_id for request in requests)
            raise StepFailed(f"{message}; aborted: {ids}", outputs) from error
        error.outputs = outputs  # type: ignore[attr-defined]  # Ctrl-C: others may wait for what was aborted
