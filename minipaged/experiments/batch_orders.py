"""BatchLLM's gains on an offline batch: prefix groups, request order and memory-centric batching, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from math import inf
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.core.plan import SampledToken
from minipaged.core.request import Request
from minipaged.core.seams import FCFS, AdmissionPolicy, Limits
from minipaged.events import Admitted, Event, Preempted
from minipaged.experiments.figures import bars
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.simulator import OPT_13B, Roofline, SimulatedRunner
from minipaged.experiments.timing import compare, ratio
from minipaged.features.batchllm import planning as batchllm
from minipaged.features.batchllm.groups import BatchItem, install
from minipaged.workloads import alpaca_like, sharegpt_like

if TYPE_CHECKING:
    from minipaged.llm import LLM

VOCAB = 1000
DEFAULT = EngineConfig()
Workload = list[tuple[list[int], int]]  # (prompt, output tokens) of each request


# --- workloads --------------------------------------------------------------------------------------------------


def one_level(scale: int, documents: int = 64) -> Workload:
    """Eight questions about each document; all answers about one document are short, or all are long."""
    rng, lengths, batch = Random("one-level"), alpaca_like(0), Workload()
    for _ in range(documents):
        document, long = some(rng, rng.randint(400, 1200) // scale), rng.random() < 0.5
        batch += [question(rng, document, pair, long, scale) for pair in islice(lengths, 8)]
    rng.shuffle(batch)
    return batch


def multi_level(scale: int, families: int = 8) -> Workload:
    """Prefixes on two levels: instructions, eight documents after each, one to twelve questions per document."""
    rng, lengths, batch = Random("multi-level"), alpaca_like(1), Workload()
    for _ in range(families):
        instructions = some(rng, rng.randint(100, 600) // scale)
        for _ in range(8):
            document, long = instructions + some(rng, rng.randint(100, 800) // scale), rng.random() < 0.5
            batch += [question(rng, document, pair, long, scale) for pair in islice(lengths, rng.randint(1, 12))]
    rng.shuffle(batch)
    return batch


def nothing_shared(scale: int, count: int = 400) -> Workload:
    """Chats that share no prefix."""
    rng = Random("nothing")
    return [
        (some(rng, -(-prompt // scale)), max(1, output // scale))
        for prompt, output in islice(sharegpt_like(0), count)
        if prompt + output <= 2048 - 2 * scale
    ]


def some(rng: Random, length: int) -> list[int]:
    return rng.choices(range(VOCAB), k=length)


def question(rng: Random, document: list[int], pair: tuple[int, int], long: bool, scale: int) -> tuple[list[int], int]:
    prompt, output = pair
    return document + some(rng, -(-prompt // scale)), max(1, output * (3 if long else 1) // scale)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "one level": one_level,
    "several levels": multi_level,
    "nothing shared": nothing_shared,
}


# --- schedules --------------------------------------------------------------------------------------------------


class ByMemory(FCFS):
    """First come, first served; only memory limits the number of running requests."""

    def limits(self, request: Request | None) -> Limits:
        running = sum(running.width for running in self.scheduler.running)
        limits = super().limits(request)
        return Limits(inf, limits.num_tokens + running, headroom=1)


class LongestPrefixFirst(FCFS):
    """Starts the waiting request with the longest prefix in the prefix cache first (SGLang's order)."""

    def eligible(self, waiting: list[Request]) -> list[Request]:
        if len(self.scheduler.running) >= self.scheduler.max_num_seqs:
            return []  # none can start, so skip the expensive lookups
        found = {r: len(self.scheduler.memory.match(r.live[0].tokens)) for r in waiting}
        return sorted(waiting, key=lambda r: (-found[r], r.arrival))


def in_order(order: Callable[[Workload], Iterable[int]]) -> Callable[[Engine, Workload], None]:
    """Adds the requests one by one, in this order."""

    def add(engine: Engine, work: Workload) -> None:
        for index in order(work):
            engine.add_request(str(index), work[index][0], params_of(work[index]))

    return add


def in_groups(by_ratio: bool, by_count: bool = False) -> Callable[[Engine, Workload], None]:
    """Adds the whole batch at once, grouped by prefix."""

    def plan(prompts: list[list[int]], outputs: list[int], block_size: int) -> batchllm.Plan:
        planned = batchllm.plan(prompts, outputs, block_size)
        first_come = sorted(planned.groups, key=lambda group: min(group.members))
        return planned if by_ratio else planned._replace(groups=first_come)

    def add(engine: Engine, work: Workload) -> None:
        install(engine.scheduler, by_count)
        engine.add_batch([BatchItem(str(i), one[0], params_of(one)) for i, one in enumerate(work)], plan)

    return add


def params_of(request: tuple[list[int], int]) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=request[1], ignore_eos=True)


def _ratio(work: Workload) -> list[int]:
    return sorted(range(len(work)), key=lambda i: -work[i][1] / len(work[i][0]))


class System(NamedTuple):
    """A schedule to compare: how the batch is added, and the admission policy."""

    add: Callable[[Engine, Workload], None]
    admission: Callable[[], AdmissionPolicy] = FCFS


as_they_come = in_order(lambda work: range(len(work)))
SYSTEMS = {
    "FCFS + LRU": System(as_they_come),
    "prefix-sorted + LRU": System(in_order(lambda work: sorted(range(len(work)), key=work.__getitem__))),
    "longest prefix first": System(as_they_come, LongestPrefixFirst),
    "FCFS + memory batching": System(as_they_come, ByMemory),
    "BatchLLM": System(in_groups(True)),
    "BatchLLM, no groups": System(in_order(_ratio), ByMemory),
    "BatchLLM, no ratio order": System(in_groups(False)),
    "BatchLLM, no memory batching": System(in_groups(True, by_count=True)),
}


# --- measuring --------------------------------------------------------------------------------------------------

SCALE = 8  # divides the simulation's lengths, pool and blocks, so that the embedded model is fast enough
LARGE = replace(OPT_13B, name="OPT-13B with four times the memory for its KV", num_slots=4 * OPT_13B.num_slots)
BASE, OURS, PAPER = "FCFS + LRU", "BatchLLM", "1.1–2"
WHY = (
    "the paper compares whole engines on other data, and its attention kernel reads a shared prefix once for all of a "
    "group; here only order, groups and admission differ"
)


class Run(NamedTuple):
    """The cost of serving a batch. ``saved``: the fraction of prompt tokens found in the prefix cache."""

    seconds: float
    saved: float
    preemptions: int


def measure(quick: bool, progress: Progress) -> Result:
    """All schedules on all workloads: simulated seconds, then CPU seconds of the embedded model, in turns."""
    rows: list[Row] = []
    runs: dict[str, dict[str, Run]] = {}
    for number, (name, make) in enumerate(WORKLOADS.items()):
        work = make(1)[: 160 if quick else None]
        runs[name] = {}
        for turn, (system, parts) in enumerate(SYSTEMS.items()):
            progress((number + turn / len(SYSTEMS)) / 6, f"simulated, {name}, {system}")
            runs[name][system] = simulated(parts, work)
        rows += _rows(name, runs[name])
    if not quick:
        rows += _more_memory(progress)
    rows += _real(quick, progress)
    series = {s: [runs[name][BASE].seconds / runs[name][s].seconds for name in runs] for s in list(SYSTEMS)[:5]}
    figure = bars("Throughput of a batch, beside FCFS + LRU (simulated)", list(runs), series, "× FCFS + LRU")
    assumed = [
        OPT_13B.stated(),
        "Batches of about 400 to 500 requests, all known at the start, in random order: eight questions about each of "
        "64 documents of 400 to 1,200 tokens; eight sets of instructions with eight documents each and one to twelve "
        "questions to a document; ShareGPT-like chats. Questions and answers are Alpaca-like; about every other "
        "document answers are three times as long.",
        f"max_num_seqs and max_num_batched_tokens as the engine has them by default, {DEFAULT.max_num_seqs} and "
        f"{DEFAULT.max_num_batched_tokens}. Each schedule is told the exact length of the answers.",
        f"Real engine: the embedded model, lengths, pool and blocks divided by {SCALE}; seconds of the CPU, not of the "
        "wall clock. They take turns.",
        "BatchLLM shares one beginning for each request, as in the paper. Where prompts share on several levels, "
        "sorted prompts and longest prefix first find more, since the prefix cache follows a chain of blocks through "
        "all.",
    ]
    data = {name: {system: run._asdict() for system, run in of.items()} for name, of in runs.items()}
    return Result(rows, figure, assumed, data)


def _rows(name: str, runs: dict[str, Run]) -> list[Row]:
    rows = []
    for system, run in list(runs.items())[1:]:
        paper = PAPER if system == OURS and name != "nothing shared" else None
        times = runs[BASE].seconds / run.seconds
        rows.append(Row(f"{name}: {system} / {BASE}", times, "×", paper, paper and READ, why=WHY if paper else ""))
    if any(run.saved for run in runs.values()):
        rows += [Row(f"{name}: saved of the prompts, {s}", 100 * runs[s].saved, "%") for s in list(SYSTEMS)[:5]]
    return rows


def _more_memory(progress: Progress) -> list[Row]:
    """Throughput with four times the memory, where max_num_seqs is the limit and memory is not."""
    rows = []
    for name, make in WORKLOADS.items():
        progress(0.5, f"simulated, {name}, more memory")
        base = simulated(SYSTEMS[BASE], make(1), LARGE)
        for system in ("FCFS + memory batching", OURS, "BatchLLM, no memory batching"):
            times = base.seconds / simulated(SYSTEMS[system], make(1), LARGE).seconds
            rows.append(Row(f"{name}, four times the memory: {system} / {BASE}", times, "×"))
    return rows


def _real(quick: bool, progress: Progress) -> list[Row]:
    from minipaged.llm import LLM

    llm = LLM("tiny", num_blocks=1)
    systems = list(SYSTEMS)[:5] if not quick else [BASE, OURS]
    rows = []
    for number, (name, make) in enumerate(WORKLOADS.items()):
        progress(0.5 + number / 6, f"real engine, {name}")
        work = make(SCALE)[: 60 if quick else None]
        candidates = {system: partial(real, llm, SYSTEMS[system], work) for system in systems}
        seconds = compare(candidates, 1 if quick else 4, time.process_time)
        for system in systems[1:]:
            times, spread = ratio(seconds[BASE], seconds[system])
            rows.append(Row(f"real engine, {name}: {system} / {BASE}", times, "×", spread=spread))
    return rows


def simulated(system: System, work: Workload, clock: Roofline = OPT_13B) -> Run:
    """Serves the batch on the simulated clock of the roofline."""
    runner = SimulatedRunner(clock, 16, lambda plan: None)
    engine = assemble(
        EngineConfig(
            model=clock.name,
            num_blocks=clock.num_slots // 16,
            max_model_len=2048,
            admission_policy=system.admission,
        ),
        runner,
        lambda _, plan: [SampledToken(0) for _ in plan.samples],
        vocab_size=VOCAB,
    )
    cached: dict[str, int] = {}
    preempted: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Admitted):
            cached.setdefault(event.request_id, event.num_cached)  # hits after a preemption save no prefill
        elif isinstance(event, Preempted):
            preempted.append(event.request_id)

    engine.events.subscribe(listen)
    serve(engine, system, work)
    return Run(runner.now, sum(cached.values()) / sum(len(prompt) for prompt, _ in work), len(preempted))


def real(llm: LLM, system: System, work: Workload) -> None:
    """Serves the batch on the embedded model."""
    blocks = OPT_13B.num_slots // 16
    config = EngineConfig(
        num_blocks=blocks, block_size=16 // SCALE, max_model_len=2048 // SCALE, admission_policy=system.admission
    )
    serve(llm.build_engine(config), system, work)


def serve(engine: Engine, system: System, work: Workload) -> None:
    system.add(engine, work)
    while engine.has_unfinished():
        engine.step()
