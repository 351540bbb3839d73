"""Simulates a 13B model on a laptop: the real engine, scheduler and memory manager, and a runner that only keeps time.

A roofline gives the duration of a step; every result states its numbers. Only time is simulated: the real engine
decides what is admitted, preempted, shared and copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import Any

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.core.plan import SampledToken, StepPlan
from minipaged.errors import InvalidRequest
from minipaged.workloads import TraceRequest

VOCAB = 50_272  # OPT's


@dataclass(frozen=True)
class Roofline:
    """The clock: a step takes the longer of its memory traffic and its arithmetic, plus its swaps.

    Memory traffic is the weights once, the KV of every context once per sequence, and copies twice (read and written).
    Arithmetic counts the weights only. Kernel launches, sampling, communication and the host cost nothing, so times
    are lower bounds; use them for ratios between memory managers.

    Attributes:
        memory_bandwidth: bytes per second between the GPU and its memory (HBM).
        flops: floating-point operations per second.
        weight_bytes: bytes of weights, read in every step.
        flops_per_token: floating-point operations per token, 2 for each parameter.
        kv_bytes: bytes of KV per token, in all layers.
        num_slots: tokens that fit into the memory left for the KV cache.
        link_bandwidth: bytes per second between GPU and host, for swapping.
        transfers_per_block: transfers for swapping one block: keys and values of each layer.
        transfer_seconds: start-up time of one transfer.
    """

    name: str = "OPT-13B on one A100-40GB"
    memory_bandwidth: float = 1.3e12
    flops: float = 180e12
    weight_bytes: float = 26e9
    flops_per_token: float = 26e9
    kv_bytes: int = 819_200
    num_slots: int = 15_728
    link_bandwidth: float = 25e9
    transfers_per_block: int = 80
    transfer_seconds: float = 5e-6

    def seconds(self, plan: StepPlan, block_size: int) -> float:
        """The duration of the step in seconds."""
        context = sum(chunk.start + chunk.num_tokens for chunk in plan.chunks)
        moved = (context + 2 * block_size * len(plan.copies)) * self.kv_bytes
        memory = (self.weight_bytes * bool(plan.chunks) + moved) / self.memory_bandwidth
        arithmetic = plan.num_tokens * self.flops_per_token / self.flops
        return max(memory, arithmetic) + self._swapping(len(plan.swap_outs) + len(plan.swap_ins), block_size)

    def _swapping(self, num_blocks: int, block_size: int) -> float:
        block = block_size * self.kv_bytes / self.link_bandwidth
        return num_blocks * (block + self.transfers_per_block * self.transfer_seconds)

    def stated(self) -> str:
        """The assumptions in one sentence, for a result's readers."""
        return (
            f"Clock: {self.name}, {self.weight_bytes / 1e9:g} GB of weights and {self.kv_bytes / 1024:g} KB of KV per "
            f"token at {self.memory_bandwidth / 1e12:g} TB/s, {self.flops / 1e12:g} TFLOP/s, {self.num_slots:,} slots; "
            f"swaps at {self.link_bandwidth / 1e9:g} GB/s plus {self.transfer_seconds * 1e6:g} µs for each of "
            f"{self.transfers_per_block} transfers a block. Host and kernel launches cost nothing."
        )


OPT_13B = Roofline()


@dataclass(frozen=True)
class Served:
    """One finished request, with its end in seconds of the simulated clock."""

    request: TraceRequest
    finished: float

    @property
    def normalized_latency(self) -> float:
        """Seconds from arrival to end, per output token (PagedAttention, §6.1)."""
        return (self.finished - self.request.arrival) / self.request.num_output


@dataclass
class Simulation:
    """The measurements of a run. ``batch``: requests in the running batch, in each step after the warm-up."""

    clock: Roofline
    served: list[Served] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    seconds: float = 0.0
    preemptions: int = 0
    output_tokens: int = 0

    @property
    def normalized_latency(self) -> float:
        """Mean over the requests."""
        return fmean(served.normalized_latency for served in self.served)

    @property
    def mean_batch(self) -> float:
        """Mean over the steps."""
        return fmean(self.batch)


class SimulatedRunner:
    """A runner that computes nothing: it advances the clock by the time that each plan would take."""

    def __init__(self, clock: Roofline, block_size: int, watch: Callable[[StepPlan], None]) -> None:
        self.clock, self.block_size, self._watch = clock, block_size, watch
        self.now = 0.0

    def execute(self, plan: StepPlan) -> None:
        self.now += self.clock.seconds(plan, self.block_size)
        if plan.maps is not None:
            plan.maps.done = True  # vAttention waits for mapped pages; here, mapping takes no time
        self._watch(plan)


def simulate(
    requests: Iterable[TraceRequest],
    clock: Roofline = OPT_13B,
    *,
    watch: Callable[[Engine, StepPlan], None] | None = None,
    warm_up: int = 0,
    saturated: bool = False,
    **settings: Any,
) -> Simulation:
    """Simulates a trace. ``settings`` are fields of `EngineConfig`; the defaults suit OPT and the clock's memory.

    ``watch`` is called with the engine and the plan of every step, after its memory is reserved and before any sequence
    finishes; but only after ``warm_up`` requests have finished, because all sequences are short at first. A
    ``saturated`` run ends when the waiting queue is empty, because the pool is no longer full then. Each sequence runs
    to the trace's output length. Raises `InvalidRequest` for requests that the engine rejects.
    """
    fields: dict[str, Any] = {"block_size": 16, "max_model_len": 2048, "max_num_seqs": 256}
    fields |= {"max_num_batched_tokens": 2048, "enable_prefix_caching": False, "model": clock.name} | settings
    if fields.get("speculate"):
        raise InvalidRequest("which drafts are accepted depends on the model: speculate on a real model")
    fields.setdefault("num_blocks", clock.num_slots // fields["block_size"])
    result = Simulation(clock)

    by_id: dict[str, TraceRequest] = {}
    ids = count()

    def look(plan: StepPlan) -> None:
        result.preemptions += len(plan.preempted)
        if len(result.served) >= warm_up:
            result.batch.append(len(engine.scheduler.running))
            if watch is not None:
                watch(engine, plan)

    def sampler(_: None, plan: StepPlan) -> list[SampledToken]:
        result.output_tokens += len(plan.samples)
        return [
            SampledToken(by_id[request.request_id].token(len(seq.tokens), VOCAB, request.seqs.index(seq)))
            for request, seq in plan.samples
        ]

    runner = SimulatedRunner(clock, fields["block_size"], look)
    engine = assemble(EngineConfig(**fields), runner, sampler, vocab_size=VOCAB)
    coming = deque(sorted((r for r in requests if not r.failed), key=lambda r: r.arrival))
    while coming or engine.has_unfinished():
        if not engine.has_unfinished():
            runner.now = max(runner.now, coming[0].arrival)
        while coming and coming[0].arrival <= runner.now:
            _add(engine, by_id, str(next(ids)), coming.popleft())
        outputs = engine.step()
        result.served += [Served(by_id.pop(o.request_id), runner.now) for o in outputs if o.finished]
        if saturated and not coming and not engine.scheduler.waiting:
            break
    result.seconds = runner.now
    return result


def _add(engine: Engine, by_id: dict[str, TraceRequest], request_id: str, request: TraceRequest) -> None:
    if request.beam_width:
        raise InvalidRequest("which beams survive depends on the model: run beam searches on a real model")
    by_id[request_id] = request
    params = SamplingParams(n=request.n, max_tokens=request.num_output, ignore_eos=True)
    engine.add_request(request_id, request.token_ids(VOCAB), params)
