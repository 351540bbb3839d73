"""Correctness checks: kernels against their oracles, generations against transformers, memory accesses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.job import Job

ROOT = Path(__file__).parents[2]
TESTS = "tests/kernels/test_cuda.py"


def kernel_tests(job: Job) -> None:
    """Tests the CUDA kernels against the oracle in float64, with pytest in several processes, as compiling is slow."""
    report = job.path.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, f"--junit-xml={report}"]
    if not job.smoke and find_spec("xdist"):
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    done = subprocess.run(command, cwd=ROOT, timeout=max(1.0, job.left() - 3))
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    job.note(command=f"pytest {TESTS}", **counts)
    if done.returncode not in (0, 5 if job.smoke else 0):
        job.fail(f"{counts['failures'] + counts['errors']} of {counts['tests']} kernel tests failed")
    if not job.smoke and (counts["skipped"] or not counts["tests"]):
        job.fail(f"{counts['skipped']} of {counts['tests']} kernel tests were skipped, and so say nothing")


# --- the whole engine against transformers ------------------------------------------------------------------

FAMILIES = ("gpt2", "llama3", "mistral", "qwen3")  # see tests/models/families.py
PROMPT_LENGTHS = (1, 5, 16, 17, 40)
NUM_TOKENS = 24
WAYS: dict[str, dict[str, Any]] = {
    "torch": {"attention": "torch"},
    "triton": {"attention": "triton", "cuda_graphs": False},
    "triton, CUDA graphs": {"attention": "triton", "cuda_graphs": True},
}


def parity(job: Job) -> None:
    """Compares greedy tokens in float32 with transformers', for every backend, with cache hits and preemptions."""
    from minipaged.models.loader import resolve

    ways = {"torch": WAYS["torch"]} if job.smoke else WAYS
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama3",) if job.smoke else ("tiny", *FAMILIES):
            if job.left() < 10:
                job.row("cases", model=name, skipped="the section's time is over")
                continue
            directory = resolve(name) if name == "tiny" else _save(name, Path(folder))
            prompts = _prompts(directory)
            expected = _transformers(directory, prompts, job.device)
            for way, settings in ways.items():
                for case, found, happened in _engines(directory, prompts, settings, job.device.type):
                    equal = found == expected and happened
                    job.row("cases", model=name, way=way, case=case, equal=equal)
                    if found != expected:
                        job.fail(f"{name}, {way}, {case}: not as transformers: {_difference(found, expected)}")
                    elif not happened:
                        job.fail(f"{name}, {way}, {case}: what the case is about did not happen")
        if not job.smoke:
            _sampling(job, ways)


def _engines(
    directory: Path, prompts: list[list[int]], settings: dict[str, Any], device: str
) -> Iterator[tuple[str, list[list[int]], bool]]:
    """Yields (case, generated tokens, whether the hit or preemption of this case happened)."""
    from minipaged import LLM

    common = {"device": device, "dtype": "float32", "max_model_len": 96, "max_num_seqs": 5, "block_size": 4} | settings
    llm = LLM(str(directory), num_blocks=120, **common)
    kinds = _watched(llm)
    yield "all at once", _greedy(llm, prompts), "preempted" not in kinds
    again = _greedy(llm, prompts)
    yield "prefixes cached", again, "prefix" in kinds
    for preemption in ("recompute", "swap"):
        # 24 blocks hold one sequence of 64 tokens, but not all five, so requests are preempted.
        llm = LLM(str(directory), num_blocks=24, preemption=preemption, max_num_batched_tokens=11, **common)
        kinds = _watched(llm)
        wanted = "preempted" if preemption == "recompute" else "swapped_in"
        yield f"preempted: {preemption}", _greedy(llm, prompts), wanted in kinds


def flex(job: Job) -> None:
    """Compares attention="flex" with "torch", in a section of its own, as it may compile for a minute."""
    from minipaged import LLM, SamplingParams

    if job.smoke:
        job.note(not_run="torch takes minutes to compile it for a CPU")
        return
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    settings = {"device": "cuda", "dtype": "float32", "num_blocks": 16, "max_model_len": 64, "max_num_seqs": 1}
    prompt = list(range(3, 43))
    torch, flex = (LLM("tiny", attention=way, **settings).generate(prompt, params) for way in ("torch", "flex"))
    job.row("cases", model="tiny", way="flex", equal=flex[0].outputs[0].token_ids == torch[0].outputs[0].token_ids)
    if not job.findings["cases"][0]["equal"]:
        job.fail("attention by flex generates other tokens than by torch")


def _watched(llm: Any) -> set[str]:
    """A set that collects the types and reasons of all events from now on ("prefix": a cached block is shared)."""
    kinds: set[str] = set()
    llm.engine.events.subscribe(lambda e: kinds.update({e.type, getattr(e, "reason", None) or e.type}))
    return kinds


def _greedy(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    from minipaged import SamplingParams

    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


def _prompts(directory: Path) -> list[list[int]]:
    """Random prompts of `PROMPT_LENGTHS` tokens, the same for every backend."""
    import json
    from random import Random

    vocab = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    random = Random(0)
    return [[random.randrange(3, vocab) for _ in range(length)] for length in PROMPT_LENGTHS]


def _save(family: str, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    from tests.models.families import config_of, randomize

    model = AutoModelForCausalLM.from_config(config_of(family))
    randomize(model)
    model.save_pretrained(folder / family)
    return folder / family


def _transformers(directory: Path, prompts: list[list[int]], device: Any) -> list[list[int]]:
    """transformers' greedy tokens in float32 on the same device, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).to(device)
    model.eval().generation_config.eos_token_id = None
    outputs = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False,
                                 pad_token_id=0)  # fmt: skip
            outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def _difference(found: list[list[int]], expected: list[list[int]]) -> str:
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), "the end")
            return f"sequence {i} differs at {at} (of {len(ours)} and {len(theirs)} tokens)"
    return "equal"


def _sampling(job: Job, ways: dict[str, dict[str, Any]]) -> None:
    """Checks that a seed samples the same tokens on the CPU and with every backend on the GPU, in float32."""
    from minipaged import LLM, SamplingParams

    params = SamplingParams(n=3, seed=5, temperature=0.8, top_p=0.9, max_tokens=20, ignore_eos=True)
    expected = None
    for name, settings in {"CPU": {"device": "cpu"}, **ways}.items():
        llm = LLM("tiny", dtype="float32", num_blocks=120, max_model_len=96, **{"device": job.device.type, **settings})
        found = [out.token_ids for out in llm.generate("Once upon a time", params)[0].outputs]
        expected = expected or found
        job.row("cases", model="tiny", way=name, case="sampling with a seed", equal=found == expected)
        if found != expected:
            job.fail(f"sampling with a seed: {name} differs from the CPU: {_difference(found, expected)}")


# --- compute-sanitizer --------------------------------------------------------------------------------------


def sanitizer(job: Job) -> None:
    """Runs every kernel once under compute-sanitizer's memcheck, if this tool is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if job.smoke or tool is None:
        job.note(not_run="a smoke run has no GPU" if job.smoke else "there is no compute-sanitizer here")
        return
    command = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "99"]
    # Off: torch's allocator hands out parts of large pieces, which hides accesses out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.gpu.small_run"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, job.left() - 3),
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        job.note(not_run=f"it took longer than {expired.timeout:.0f} s")
        return
    printed = done.stdout + done.stderr
    job.note(tool=tool, exit_code=done.returncode, output=printed[-3000:])
    if done.returncode and "Device not supported" in printed:
        job.note(not_run="the tool does not support this device")
    elif done.returncode != 0:
        print(printed[-3000:])
        job.fail(f"compute-sanitizer ended with exit code {done.returncode}")
