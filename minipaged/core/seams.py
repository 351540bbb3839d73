"""Where features plug in: four Protocols and a base class (`Stage`), with the heart's own defaults.

What each decides, and who implements it. Smaller seams: `prefix_cache.EvictionPolicy`, the engine's ``sampler``, the
runner's ``forward``, and subclasses of `KVCache`.

    MemoryManager     who owns which slot           BlockTables; features.contiguous, features.vattention
    Runner            how a plan is executed        execution.runner; runners of features wrap each other
    AdmissionPolicy   who may start, and how many   FCFS; features.static_batching, features.batchllm
    Stage             hooks round each decision     features.swap, features.speculative, …
    Decoding          how a request takes tokens    Sampling; features.beam_search
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

from minipaged.core.block_table import Demand
from minipaged.core.params import SamplingParams
from minipaged.core.plan import Copy, SampledToken, StepPlan, Write
from minipaged.core.prefix_cache import Hit
from minipaged.core.request import Request, Sequence
from minipaged.errors import InvalidRequest  # typed errors
from minipaged.events import EngineError  # events
from minipaged.events.waste import Held, Progress  # Held: slots by class of waste; Progress: lengths


class MemoryManager(Protocol):
    """What the scheduler, and features that go with any manager, ask of memory: see `BlockTables`."""

    block_size: int
    tables: dict[int, list[int]]  # of all sequences that have blocks, by sequence id
    pool: Any  # as a BlockPool, it has num_blocks, num_free and ref_counts

    def refusal(self, demand: Demand) -> str | None: ...
    def fits(self, demand: Demand, hits: Seq[Hit] = (), outstanding: int = 0, growth: int = 0) -> bool: ...
    def match(self, tokens: Seq[int]) -> list[Hit]: ...
    def open(self, seq_id: int, hits: Seq[Hit], demand: Demand) -> None: ...
    def blocks_for(self, num_tokens: int) -> int: ...
    def blocks_to_hold(self, demand: Demand) -> int: ...
    def blocks_needed(self, writes: Collection[Write]) -> int: ...
    def reserve(self, write: Write) -> list[Copy]: ...
    def mark_computed(self, seq_id: int, tokens: Seq[int], num_computed: int) -> None: ...
    def trim(self, seq_id: int, num_tokens: int) -> list[int]: ...
    def prepare_fork(self, seq_id: int) -> bool: ...
    def fork(self, parent: int, child: int) -> None: ...
    def free(self, seq_id: int) -> None: ...
    def held(self, progress: Iterable[Progress], waiting: Demand | None = None) -> Held: ...
    def check(self, num_computed: Mapping[int, int] | None = None) -> None: ...


class Runner(Protocol):
    def execute(self, plan: StepPlan) -> Any:
        """Runs the plan's copies and chunks, if any. Returns logits [R, vocab], ``num_rows`` of them for each chunk."""


class Limits(NamedTuple):
    """How much may run. ``headroom``: blocks to leave free for each running sequence. ``needs_tokens``: a request
    starts only while the step has tokens left."""

    num_seqs: float  # may be infinite
    num_tokens: int
    headroom: int = 0
    needs_tokens: bool = True


class AdmissionPolicy(Protocol):
    """Who may start next. The first eligible request that does not fit ends admission for this step."""

    extra_args: frozenset[str]  # names in `SamplingParams.extra_args` that it reads

    def bind(self, scheduler: Any) -> None:
        """Called first, with the `Scheduler`."""

    def rank(self, request: Request) -> float:
        """Fixed when the request arrives: all queues are in the order of (rank, arrival), and the last is preempted."""

    def eligible(self, waiting: list[Request]) -> Iterable[Request]:
        """The requests that may start now, in order: ``waiting`` itself, or some of it."""

    def limits(self, request: Request | None) -> Limits:
        """For ``request`` to start: all but ``num_tokens``; for ``None``, a step: ``num_tokens`` and ``num_seqs``."""

    def hits(self, request: Request) -> list[Hit]:
        """Blocks whose KV the request need not compute."""


class FCFS:
    """First come, first served."""

    extra_args: frozenset[str] = frozenset()

    def bind(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def rank(self, request: Request) -> float:
        return 0

    def eligible(self, waiting: list[Request]) -> list[Request]:
        return waiting

    def limits(self, request: Request | None) -> Limits:
        return Limits(self.scheduler.max_num_seqs, self.scheduler.max_num_batched_tokens)

    def hits(self, request: Request) -> list[Hit]:
        if request.prompt_logprobs is not None:
            return []  # a cached block has keys and values, but the logits are wanted too
        return list(self.scheduler.memory.match(request.live[0].tokens[: request.fork_at]))


class Stage:
    """Base of what acts between the scheduler's decisions. Each hook does nothing here; override what you need.
    Where a hook returns a bool, stages are asked until one answers other than the default."""

    def bind(self, scheduler: Any) -> None:
        """Called first, with the `Scheduler`."""
        self.scheduler = scheduler

    def before_admission(self, plan: StepPlan) -> bool:
        """Those that run are on the plan; none was preempted or outgrew the pool. False: no request is admitted now."""
        return True

    def preempting(self, request: Request, plan: StepPlan) -> bool:
        """The request left the running queue. True: this stage took its block tables, set its status and keeps it."""
        return False

    def reclaim(self, request: Request, plan: StepPlan) -> bool:
        """A request alone in the pool lacks blocks. True: this stage freed some. If no stage does, a sequence ends."""
        return False

    def planned(self, plan: StepPlan) -> None:
        """All requests are on the plan. Stages that extend it come first, those that only read it last."""

    def sampled(self, request: Request) -> None:
        """The request's sequences took their tokens of this step."""

    def committed(self, plan: StepPlan) -> None:
        """All requests of the plan took their tokens."""

    def forked(self, parent: Request, child: Request) -> None:
        """`Engine.fork` made a copy of a request."""

    def releasing(self, request: Request, seq: Sequence) -> None:
        """The sequence is about to lose its block table, or what this stage keeps of it."""

    def finished(self, request: Request) -> None:
        """The last sequence of the request ended."""

    def requests(self) -> Collection[Request]:
        """Unfinished requests that this stage keeps, which are neither waiting nor running."""
        return ()

    def failed(self, plan: StepPlan) -> Iterable[Request]:
        """The plan failed midway. Returns requests to abort besides those of its chunks."""
        return ()

    def check(self) -> None:
        """Raises `InvariantViolation` if this stage's bookkeeping is inconsistent."""


class Decoding(Protocol):
    """How the sequences of one request take their tokens. ``independent``: no sequence depends on the others, so that
    text may be shown before the end, and a sequence may be forked or speculate on its own."""

    streams: int  # sequences at the start, each with its own random numbers
    independent: bool
    num_logprobs: int | None  # likeliest tokens that the sampler must report; None: no log-probabilities

    def width(self, request: Request) -> int:
        """Sequences that the request may have running."""

    def target(self, request: Request, seq: Sequence) -> int:
        """How many of its tokens the sequence may have computed after this step."""

    def advance(self, request: Request, rows: list[tuple[Sequence, SampledToken]], scheduler: Any) -> None:
        """Applies a step's sampled tokens: appends, forks, finishes."""

    def end(self, request: Request, seqs: list[Sequence], reason: str, scheduler: Any) -> None:
        """Ends these sequences early, or all of them where they depend on each other (beams)."""


class Sampling:
    """The heart's `Decoding`: sequences append their own tokens. Raises `InvalidRequest` where another is asked for."""

    independent = True

    def __init__(self, params: SamplingParams, stop_token_ids: frozenset[int]) -> None:
        if params.beam_width:
            raise InvalidRequest("beam_width needs features.beam_search, which this engine was built without")
        self.streams, self.num_logprobs = params.n, params.logprobs

    def width(self, request: Request) -> int:
        return len(request.live)

    def target(self, request: Request, seq: Sequence) -> int:
        return len(seq.tokens)

    def advance(self, request: Request, rows: list[tuple[Sequence, SampledToken]], scheduler: Any) -> None:
        for seq, token in rows:
            if token.error is not None and seq.finish_reason is None:
                scheduler.events.emit(EngineError, f"{request.request_id} failed: {token.error}")
                request.error = token.error
                self.end(request, list(request.live), "error", scheduler)
            if seq.finish_reason is not None:
                continue  # this ended it, or an earlier token of its draft
            at_limit = "length" if seq.num_output + 1 >= request.max_output else None
            reason = "stop" if token.token_id in request.stop_token_ids else at_limit
            if reason := scheduler.take(request, seq, token, reason):
                scheduler.finish(request, seq, reason)

    def end(self, request: Request, seqs: list[Sequence], reason: str, scheduler: Any) -> None:
        for seq in seqs:
            scheduler.finish(request, seq, reason)
