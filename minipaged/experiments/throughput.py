"""Throughput of the real engine under each memory manager with the same memory, in real time on this device."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from minipaged.config import EngineConfig, SamplingParams
from minipaged.experiments.figures import bars
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.saturation import SYSTEMS
from minipaged.experiments.simulator import OPT_13B
from minipaged.experiments.timing import ratio
from minipaged.workloads import TraceRequest, at_once, sharegpt_like, trace

if TYPE_CHECKING:
    from minipaged.core.engine import Engine
    from minipaged.llm import LLM

SCALE = 16  # divides the paper's lengths, pool and blocks, so that the embedded model can serve them quickly
SLOTS, LONGEST, BLOCK = OPT_13B.num_slots // SCALE, 2048 // SCALE, 2
SERVERS = dict(SYSTEMS)
if sys.platform == "linux":  # other systems cannot map memory piece by piece
    SERVERS["vAttention"] = {"memory": "vattention", "tensor_slicing": True}
PAPER = {"FasterTransformer": "up to 22", "Orca (Max)": "2.7–8", "Orca (Oracle)": "1.7–2.7"}
WHY = (
    "the paper compares sustained rates of a 13B model on a GPU; a step of a small model on a CPU spends less time on "
    "reading weights, which a larger batch shares, and more on attention, which it does not"
)
SLOWER = (
    "vAttention keeps each request's keys in one address range, not in blocks; on a CPU torch computes its steps "
    "operation by operation, and those of the others are one call of C++"
)


def measure(quick: bool, progress: Progress) -> Result:
    """Output tokens per second and mean batch while requests wait; the systems take turns."""
    from minipaged.llm import LLM

    warm_up, slice_, rounds = (800, 300, 3) if quick else (2000, 400, 12)
    llm = LLM("tiny", num_blocks=1)
    requests = scaled(400 if quick else 1500)
    servers = {}
    for index, (system, settings) in enumerate(SERVERS.items()):
        progress(index / (2 * len(SERVERS)), f"{system}, warm-up")
        servers[system] = Server(llm, requests, **settings)
        servers[system].serve(warm_up)
    speed: dict[str, list[float]] = {system: [] for system in SERVERS}
    batch: dict[str, list[int]] = {system: [] for system in SERVERS}
    for number in range(rounds):
        progress((1 + number / rounds) / 2, f"round {number + 1} of {rounds}")
        for system, server in servers.items():
            tokens_per_second, batches = server.serve(slice_)
            speed[system].append(tokens_per_second)
            batch[system] += batches
    mean_batch = {system: fmean(batches) for system, batches in batch.items()}
    series = {"tokens/s": [median(values) for values in speed.values()]}
    figure = bars("Throughput at one memory budget", list(speed), series, "output tokens/s")
    assumed = [
        f"The embedded model, {SLOTS:,} slots of KV cache for each system, at most {LONGEST} tokens a request, blocks "
        f"of {BLOCK}: ShareGPT-like lengths, the paper's pool and limit, divided by {SCALE}. The queue is never empty.",
        f"After {warm_up} tokens each, the systems take turns of {slice_} tokens: {rounds} rounds.",
    ]
    return Result(_rows(speed, mean_batch), figure, assumed, {"tokens_per_second": speed, "mean_batch": mean_batch})


def _rows(speed: dict[str, list[float]], mean_batch: dict[str, float]) -> list[Row]:
    rows = [
        Row(f"{system}: throughput", median(values), "tokens/s", spread=(min(values), max(values)))
        for system, values in speed.items()
    ]
    rows += [Row(f"{system}: mean batch", mean, "requests") for system, mean in mean_batch.items()]
    for system in (system for system in speed if system != "paged"):
        times, spread = ratio(speed["paged"], speed[system])
        paper = PAPER.get(system)
        why = WHY if paper else SLOWER if system == "vAttention" else ""
        rows.append(Row(f"paged / {system}", times, "×", paper, paper and READ, spread, why))
    if "vAttention" in speed:
        times, spread = ratio(speed["vAttention"], speed["Orca (Max)"])
        rows.append(Row("vAttention / Orca (Max)", times, "×", spread=spread, why=SLOWER))
    return rows


def scaled(count: int) -> list[TraceRequest]:
    """ShareGPT-like requests with lengths divided by `SCALE`."""
    return [
        replace(request, num_prompt=-(-request.num_prompt // SCALE), num_output=-(-request.num_output // SCALE))
        for request in trace(sharegpt_like(0), at_once(count))
        if request.num_prompt + request.num_output <= 2048 - 2 * SCALE  # leaves room for rounding up
    ]


class Server:
    """One system: an engine with all requests in its waiting queue."""

    def __init__(self, llm: LLM, requests: list[TraceRequest], **settings: Any) -> None:
        self.engine = _engine(llm, settings)
        for index, request in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=request.num_output, ignore_eos=True)
            self.engine.add_request(str(index), request.token_ids(self.engine.vocab_size), params)

    def serve(self, num_tokens: int) -> tuple[float, list[int]]:
        """Steps until ``num_tokens`` tokens are generated. Returns tokens per second and the batch of each step."""
        batch: list[int] = []
        tokens, started = 0, time.perf_counter()
        while tokens < num_tokens:
            if not self.engine.scheduler.waiting:
                raise RuntimeError("the waiting queue is empty, so the pool is no longer full; give more requests")
            tokens += sum(len(output.outputs) for output in self.engine.step())
            batch.append(len(self.engine.scheduler.running))
        return tokens / (time.perf_counter() - started), batch


def _engine(llm: LLM, settings: dict[str, Any]) -> Engine:
    fields: dict[str, Any] = {"block_size": BLOCK, "max_model_len": LONGEST, "max_num_seqs": 64}
    fields |= {"enable_prefix_caching": False} | settings
    return llm.build_engine(EngineConfig(num_blocks=SLOTS // fields["block_size"], **fields))
