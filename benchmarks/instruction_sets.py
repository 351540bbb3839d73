"""Throughput of the C++ step by the CPU's instruction set, compared with torch on the CPU as it is.

    python -m benchmarks.instruction_sets [--rounds 5]

The 6M Llama of ``minipaged bench peers`` in float32: prompts of 64 tokens, outputs of 32. The same source, compiled for
any x86-64 CPU (registers of 4 floats), for AVX2 (8, most laptops), for AVX-512 (16) and for this CPU; and
``attention="torch"``. All take turns; tokens/s, the median of the rounds. Writes results/instruction_sets.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from benchmarks.result_files import write
from minipaged import LLM, SamplingParams
from minipaged.bench.peers import make_checkpoint
from minipaged.kernels import native

PROMPT, TOKENS = 64, 32
LEVELS = {"x86-64": (), "x86-64-v3": ("AVX2", "AVX512"), "x86-64-v4": ("AVX512",), "native": ()}  # CPUs that run each


def compiled_for(level: str) -> Any:
    """The C++ step in float32, compiled for this level of CPUs, with OpenMP as in the engine."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    openmp = native._loaded_openmp()
    assert compiler and openmp, "needs a C++ compiler, and a torch that runs on GNU OpenMP"
    return native._built(compiler, (f"-march={level}", "-fopenmp", openmp))["forward", torch.float32]


def tokens_per_second(llm: LLM, batch: int, seed: int) -> float:
    random = Random(seed)
    prompts: list[Any] = [[random.randrange(3, 4096) for _ in range(PROMPT)] for _ in range(batch)]
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    return batch * TOKENS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    here = torch.backends.cpu.get_cpu_capability()
    result = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_checkpoint("llama-6m", Path(folder)))
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "enable_prefix_caching": False}
        ours, torchs = LLM(model, attention="native", **settings), LLM(model, attention="torch", **settings)
        steps = {level: compiled_for(level) for level, needs in LEVELS.items() if not needs or here in needs}
        for batch in (1, 8, 32):
            rounds: dict[str, list[float]] = {name: [] for name in (*steps, "torch")}
            for number in range(options.rounds + 1):
                for name, found in rounds.items():
                    llm = torchs if name == "torch" else ours
                    if llm is ours:
                        ours.engine.runner.forward._forward = steps[name]
                    rate = tokens_per_second(llm, batch, number)
                    if number:  # round 0 is warm-up
                        found.append(rate)
            row = {name: {"median": round(median(found)), "spread": [round(min(found)), round(max(found))]}
                   for name, found in rounds.items()}  # fmt: skip
            print(f"batch {batch:2}", row, flush=True)
            result.append({"batch": batch} | row)
    write("instruction_sets", {"tokens_per_second": result},
          f"python -m benchmarks.instruction_sets --rounds {options.rounds}")  # fmt: skip


if __name__ == "__main__":
    main()
