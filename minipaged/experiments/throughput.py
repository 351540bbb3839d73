"""Tokens a second of the real engine at one memory budget, under each manager: real time, this device."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from minipaged.experiments.figures import bars
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.saturation import SYSTEMS
from minipaged.workloads import TraceRequest, at_once, sharegpt_like, trace

if TYPE_CHECKING:
    from minipaged.engine import Engine
    from minipaged.llm import LLM

SLOTS, LONGEST = 4096, 1024  # room for four requests of the embedded model's full length
PAPER = {"FasterTransformer": "up to 22", "Orca (Max)": "2.7–8", "Orca (Oracle)": "1.7–2.7"}
WHY = (
    "the paper compares sustained rates of a 13B model on a GPU; a small model on a CPU spends less of a step on what a "
    "larger batch shares, the reading of weights, and more on what it does not"
)


def measure(quick: bool, progress: Progress) -> Result:
    """Output tokens a second and mean batch, while requests wait; the systems take turns."""
    from minipaged.llm import LLM

    llm = LLM("tiny", num_blocks=1)
    requests = halved(40 if quick else 150)
    rounds, speed, batch = 2 if quick else 5, dict[str, list[float]](), dict[str, float]()
    for number in range(rounds):
        for index, (system, settings) in enumerate(SYSTEMS.items()):
            progress((number + index / len(SYSTEMS)) / rounds, f"{system}, round {number + 1}")
            run = serve(llm, requests, **settings)
            speed.setdefault(system, []).append(run.tokens_per_second)
            batch[system] = run.mean_batch  # the same in every round
    rows = [
        Row(f"{system}: throughput", median(values), "tokens/s", spread=(min(values), max(values)))
        for system, values in speed.items()
    ]
    rows += [Row(f"{system}: mean batch", mean, "requests") for system, mean in batch.items()]
    for system in (system for system in SYSTEMS if system != "paged"):
        ratios = [a / b for a, b in zip(speed["paged"], speed[system], strict=True)]
        paper = (PAPER[system], READ) if system in PAPER else (None, None)
        spread = (min(ratios), max(ratios))
        rows.append(Row(f"paged / {system}", median(ratios), "×", *paper, spread, WHY if system in PAPER else ""))
    series = {"tokens/s": [median(values) for values in speed.values()]}
    figure = bars("Throughput at one memory budget", list(speed), series, "output tokens/s")
    assumed = [
        f"The embedded model, {SLOTS} slots of KV cache for each system, {len(requests)} requests with ShareGPT-like "
        f"lengths halved, all there from the start; measured until none waits, {rounds} rounds."
    ]
    return Result(rows, figure, assumed, {"tokens_per_second": speed, "mean_batch": batch})


@dataclass(frozen=True)
class Run:
    """A run of the real engine."""

    tokens_per_second: float
    mean_batch: float


def halved(count: int) -> list[TraceRequest]:
    """ShareGPT-like requests of half the length, so that the embedded model can serve all of them."""
    return [
        replace(request, num_prompt=request.num_prompt // 2, num_output=(request.num_output + 1) // 2)
        for request in trace(sharegpt_like(0), at_once(count))
    ]


def serve(llm: LLM, requests: list[TraceRequest], **settings: Any) -> Run:
    """Steps an engine of its own until no request waits."""
    engine = _engine(llm, settings)
    for index, request in enumerate(requests):
        _add(engine, str(index), request)
    batch: list[int] = []
    tokens, started = 0, time.perf_counter()
    while engine.scheduler.waiting:
        tokens += sum(len(output.outputs) for output in engine.step())
        batch.append(len(engine.scheduler.running))
    return Run(tokens / (time.perf_counter() - started), fmean(batch))


def _engine(llm: LLM, settings: dict[str, Any]) -> Engine:
    from minipaged.config import EngineConfig

    defaults = {"block_size": 16, "max_model_len": LONGEST, "max_num_seqs": 64, "enable_prefix_caching": False}
    defaults |= settings
    return llm.build_engine(EngineConfig(num_blocks=SLOTS // defaults["block_size"], **defaults))


def _add(engine: Engine, request_id: str, request: TraceRequest) -> None:
    from minipaged.config import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=request.num_output, ignore_eos=True)
    engine.add_request(request_id, request.token_ids(engine.vocab_size), params)
