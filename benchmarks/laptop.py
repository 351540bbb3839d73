"""A chat on a laptop: how much memory it takes, and how long it takes to start.

    python -m benchmarks.laptop [--rounds 5] [MODEL ...]

For the embedded model and for each MODEL (a directory or a file), in turns:

- ``peak_mb``: the peak resident memory of ``minipaged chat`` after three messages, and of a process that only imports
  torch and transformers. Above the latter there should be the weights, the KV that was written, and at most 150 MB.
- ``first_token_s``: seconds from the weights on disk to the first token, after the imports. 135M should take 2 s.
- ``prompt_s``: seconds from the command ``minipaged chat`` to its prompt. The embedded model should take 3 s.

``…_cpu_s`` is the time on a CPU: a little less than the other on an idle machine, far less on a busy one. Every
measurement has a process of its own. Round 0 warms the file cache and compiles the C++; it does not count. Memory
is the median, like time. Linux only (/proc). Writes results/laptop.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.result_files import write

MESSAGES = ("What is a cat?", "Tell me more about it.", "Write a short story about one.")
TOKENS = 64  # in an answer
ALLOWED = 150  # MB above weights, KV and imports

IMPORTS = "import torch, transformers"
# Runs the command, and then tells what its engine holds.
CHAT = """
import json, sys
from minipaged.cli import chat_command, main
made, load = [], chat_command.load
chat_command.load = lambda *args, **settings: made.append(load(*args, **settings)) or made[0]
try:
    main()
except SystemExit:
    pass
from minipaged.build import kv_tensors
from minipaged.execution.lazy_memory import committed
llm = made[0]
weights = {parameter.data_ptr(): parameter.nbytes for parameter in llm._loaded.model.parameters()}
tensors = kv_tensors(llm.engine)
told = {"weights": sum(weights.values()), "kv": committed(tensors), "pool": sum(one.nbytes for one in tensors)}
"""
FIRST_TOKEN = """
import json, sys, time
import torch
from transformers import AutoTokenizer, PreTrainedConfig
from minipaged.llm import LLM
from minipaged import SamplingParams
began, cpu = time.perf_counter(), time.process_time()
llm = LLM(sys.argv[1], max_num_seqs=1)
ids = llm.render_chat([{"role": "user", "content": "What is a cat?"}])
llm.generate([ids], SamplingParams(max_tokens=1, temperature=0))
told = {"first_token_s": time.perf_counter() - began, "first_token_cpu_s": time.process_time() - cpu}
"""
TELL = """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
told["peak"] = int(status["VmHWM"].split()[0]) * 1024
print("\\n" + json.dumps(told))
"""


def run(code: str, *args: str, said: str = "") -> dict[str, Any]:
    """Runs Python code in a process of its own; returns what it tells, with its peak of resident memory in bytes."""
    command = [sys.executable, "-c", code + TELL, *args]
    done = subprocess.run(command, input=said, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def to_prompt(model: str) -> dict[str, float]:
    """Seconds, and seconds on a CPU, until ``minipaged chat`` waits for a message."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "minipaged", "chat", "--model", model]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as chat:
        assert chat.stdin and chat.stdout
        seen = b""
        while not seen.endswith(b"\n> "):
            byte = chat.stdout.read(1)
            if not byte:
                sys.exit(f"minipaged chat --model {model} ended before its prompt")
            seen += byte
        told = {"prompt_s": time.perf_counter() - began, "prompt_cpu_s": sum(psutil.Process(chat.pid).cpu_times()[:2])}
        chat.stdin.close()
        chat.stdout.read()
    return told


def measure(model: str) -> dict[str, float]:
    args = ["chat", "--model", model, "--max-tokens", str(TOKENS), "--temperature", "0"]
    chat = run(CHAT, *args, said="\n".join(MESSAGES) + "\n")
    imports = run(IMPORTS + "\nimport json\ntold = {}")["peak"]
    mb = {f"{name}_mb": value / 1e6 for name, value in (chat | {"imports": imports}).items()}
    mb["above_mb"] = mb["peak_mb"] - mb["imports_mb"] - mb["weights_mb"] - mb["kv_mb"]
    first = run(FIRST_TOKEN, model)
    del first["peak"]
    return mb | first | to_prompt(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {model: [] for model in ("tiny", *options.models)}
    for number in range(options.rounds + 1):
        for model, found in rounds.items():
            measured = measure(model)
            print(Path(model).name, {name: round(value, 2) for name, value in measured.items()}, flush=True)
            if number:
                found.append(measured)
    result = {"allowed_above_mb": ALLOWED, "messages": len(MESSAGES), "tokens_in_an_answer": TOKENS}
    for model, found in rounds.items():
        columns = {name: [one[name] for one in found] for name in found[0]}
        digits = {name: 2 if name.endswith("_s") else 1 for name in columns}
        result[Path(model).name] = {
            name: {"median": round(median(values), digits[name]), "all": [round(one, digits[name]) for one in values]}
            for name, values in columns.items()
        }
    names = "".join(f" {Path(model).name}" for model in options.models)
    write("laptop", result, f"python -m benchmarks.laptop --rounds {options.rounds}{names}")


if __name__ == "__main__":
    main()
