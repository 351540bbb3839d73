"""Profiles a step's parts, with a model that runs operation by operation and with one that is a single C++ call.

    python -m benchmarks.step_profile [--rounds 5]

The 6M Llama of ``minipaged bench peers`` in bfloat16, batches of 1, 8 and 32, prompts of 64 tokens, outputs of 64.
"before": ``attention="torch"``, the model's own ``forward``. "after": ``attention="native"``, `NativeForward`. The two
take turns; milliseconds per step by part, the median of the rounds. Writes results/step_profile.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.result_files import write
from minipaged import LLM, SamplingParams
from minipaged.bench.peers import make_checkpoint
from minipaged.execution import runner

TOKENS = 64
PARTS = ("schedule", "build_batch", "forward", "sample", "commit", "outputs")


class Clock:
    """Sums the seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return run


def watched(model: Path, attention: str) -> tuple[LLM, Clock]:
    """An engine with a `Clock` around each part of its step."""
    llm = LLM(str(model), device="cpu", dtype="bfloat16", attention=attention, max_model_len=1024,
              enable_prefix_caching=False)  # fmt: skip
    clock, engine = Clock(), llm.engine
    scheduler, model_runner = engine.scheduler, engine.runner
    scheduler.schedule = clock.timed("schedule", scheduler.schedule)  # type: ignore[method-assign]
    scheduler.commit = clock.timed("commit", scheduler.commit)  # type: ignore[method-assign]
    engine.sampler = clock.timed("sample", engine.sampler)
    engine._outputs = clock.timed("outputs", engine._outputs)  # type: ignore[method-assign]
    if model_runner.forward is not model_runner.model:
        model_runner.forward = clock.timed("forward", model_runner.forward)
    model_runner.model.forward = clock.timed("forward", model_runner.model.forward)
    return llm, clock


def measure(llm: LLM, clock: Clock, batch: int, seed: int) -> dict[str, float]:
    """Milliseconds per step of one run, by part; ``rest`` is the time outside all parts."""
    random = Random(seed)
    prompts: list[Any] = [[random.randrange(3, 4096) for _ in range(64)] for _ in range(batch)]
    clock.seconds.clear()
    plain, runner.build_batch = runner.build_batch, clock.timed("build_batch", runner.build_batch)
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    total = time.perf_counter() - started
    runner.build_batch = plain
    parts = {part: clock.seconds[part] for part in PARTS}
    parts |= {"rest": total - sum(parts.values()), "total": total}
    return {part: seconds / TOKENS * 1e3 for part, seconds in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint("llama-6m", Path(folder))
        sides = {"before": watched(model, "torch"), "after": watched(model, "native")}
        for batch in (1, 8, 32):
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for number in range(options.rounds + 1):
                for name, (llm, clock) in sides.items():
                    found = measure(llm, clock, batch, number)
                    if number:  # round 0 is warm-up
                        rounds[name].append(found)
            row: dict[str, Any] = {"batch": batch}
            for name, found_in in rounds.items():
                row[name] = {part: round(median(r[part] for r in found_in), 3) for part in found_in[0]}
                totals = [r["total"] for r in found_in]
                row[name]["spread"] = [round(min(totals), 3), round(max(totals), 3)]
                print(f"batch {batch:2} {name:6}", row[name], flush=True)
            result.append(row)
    command = f"python -m benchmarks.step_profile --rounds {options.rounds}"
    write("step_profile", {"milliseconds_a_step": result}, command)


if __name__ == "__main__":
    main()
