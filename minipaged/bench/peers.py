"""Compares engines on the same requests and weights: each has its own process and Python, and they take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.table import Table

from minipaged.bench import drivers
from minipaged.errors import InvalidConfig

Requests = tuple[list[list[int]], list[int]]  # prompts, wanted output lengths
LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Shape:
    """A model to make, and the divisor of output lengths: larger models generate less, so that a run stays short."""

    config: dict[str, Any]
    shorter: int


SHAPES = {
    "llama-6m": Shape(
        LLAMA
        | dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8)
        | dict(num_key_value_heads=4),
        shorter=1,
    ),
    "smollm2-135m": Shape(
        LLAMA
        | dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
        | dict(num_key_value_heads=3),
        shorter=4,
    ),
    "gpt2-small": Shape({"model_type": "gpt2"}, shorter=4),
}


def make_checkpoint(name: str, directory: Path) -> Path:
    """Saves a model of this shape with random weights in Hugging Face's format; returns its directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = dict(SHAPES[name].config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(directory / name)
    return directory / name


def cells(shorter: int, quick: bool) -> dict[str, Callable[[Random, int], Requests]]:
    """Workloads by name: (random number generator, vocabulary size) → requests."""

    def same(batch: int) -> Callable[[Random, int], Requests]:
        length = (16 if quick else 64) // (2 if shorter > 1 else 1)
        return lambda random, vocab: ([_prompt(random, vocab, 64) for _ in range(batch)], [length] * batch)

    def mixed(random: Random, vocab: int) -> Requests:
        number = 16 if quick else 64
        prompts = [_prompt(random, vocab, random.randint(16, 256)) for _ in range(number)]
        return prompts, [random.randint(16, 256) // shorter for _ in range(number)]

    return {"batch 1": same(1), "batch 8": same(8), "batch 32": same(32), "mixed": mixed}


def _prompt(random: Random, vocab: int, length: int) -> list[int]:
    return [random.randrange(3, vocab) for _ in range(length)]


# --- the engines --------------------------------------------------------------------------------------------


def engines(names: list[str], pythons: list[str]) -> dict[str, str]:
    """Engine name → path of the Python that runs it; by default the current one. Raises `InvalidConfig`."""
    paths = {}
    for given in pythons:
        name, _, path = given.partition("=")
        if name not in drivers.ENGINES or not path:
            raise InvalidConfig(f"--python takes NAME=PATH, with a name of {', '.join(drivers.ENGINES)}; got {given!r}")
        if not Path(path).is_file():
            raise InvalidConfig(f"--python {given}: there is no Python at {path}")
        paths[name] = path
    for name in names:
        if name not in drivers.ENGINES:
            raise InvalidConfig(f"--with must be one of {', '.join(drivers.ENGINES)}, not {name!r}")
    return {name: paths.get(name, sys.executable) for name in dict.fromkeys(["minipaged", *names])}


class Driver:
    """A started engine process that waits for requests. A context manager: leaving the block kills the process."""

    def __init__(self, name: str, python: str, model: Path, dtype: str) -> None:
        self.name = name
        # One thread per available core for every engine: their own defaults differ, which would distort the comparison.
        threads = {"OMP_NUM_THREADS": str(_cores())}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, drivers.__file__, name, str(model), dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | threads,
        )  # fmt: skip
        self.ready = self._answer()

    def run(self, requests: Requests) -> dict[str, Any]:
        """Runs the requests; returns seconds, lengths and peak MiB. Raises `InvalidConfig` if the engine failed."""
        prompts, outputs = requests
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "outputs": outputs}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer["lengths"] != outputs:
            raise InvalidConfig(f"{self.name} generated other lengths than requested, so its speed cannot be compared")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:]
            raise InvalidConfig(f"{self.name} ended without an answer: {' '.join(last)}")
        return json.loads(line)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- measuring ----------------------------------------------------------------------------------------------


def measure(
    chosen: dict[str, str],
    models: list[str],
    dtypes: list[str],
    repeats: int,
    quick: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Runs all measurements: for each model and dtype it starts all engines, which take turns in every round."""
    names = models or list(SHAPES)
    if unknown := set(names) - set(SHAPES):
        raise InvalidConfig(f"--models must be among {', '.join(SHAPES)}, not {', '.join(sorted(unknown))}")
    if unknown := set(dtypes) - {"bfloat16", "float32"}:
        raise InvalidConfig(f"--dtypes must be bfloat16 or float32, not {', '.join(sorted(unknown))}")
    result: dict[str, Any] = {"repeats": repeats, "quick": quick, "engines": {}, "starts": [], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            tell(f"making {name}")
            directory = make_checkpoint(name, Path(folder))
            for dtype in dtypes:
                with ExitStack() as stack:
                    running = [stack.enter_context(Driver(e, python, directory, dtype)) for e, python in chosen.items()]
                    for driver in running:
                        result["engines"][driver.name] = driver.ready["version"]
                        start = {"model": name, "dtype": dtype, "engine": driver.name, "seconds": driver.ready["ready"]}
                        result["starts"].append(start)
                    result["rows"] += _rows(running, name, dtype, repeats, quick, tell)
    return result


def _rows(
    running: list[Driver], model: str, dtype: str, repeats: int, quick: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    shape = SHAPES[model]
    rows = []
    for cell, make in cells(shape.shorter, quick).items():
        speeds: dict[str, list[float]] = {driver.name: [] for driver in running}
        peaks: dict[str, int] = {}
        vocab = shape.config.get("vocab_size", 50257)
        for driver in running:  # warm-up: one-time work for new batch sizes is not measured
            driver.run(make(Random(-1), vocab))
        for repeat in range(repeats):
            requests = make(Random(repeat), vocab)
            for driver in running:
                answer = driver.run(requests)
                speeds[driver.name].append(round(sum(requests[1]) / answer["seconds"], 1))
                peaks[driver.name] = answer["peak_mib"]
        for name, values in speeds.items():
            rows.append(
                {"model": model, "dtype": dtype, "cell": cell, "engine": name, "tokens_per_second": values}
                | {"best": max(values), "median": round(median(values), 1), "peak_mib": peaks[name]}
                | ratios(speeds["minipaged"], values)
            )
        tell(f"{model} {dtype} {cell}: " + ", ".join(f"{name} {max(values):.0f}" for name, values in speeds.items()))
    return rows


def ratios(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """How many times as fast minipaged is, per round: in each round the two engines run one after the other."""
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": round(median(values), 2), "ratio_spread": [round(min(values), 2), round(max(values), 2)]}


# --- showing ------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> Table:
    """One line per model, dtype, workload and engine."""
    columns = ("model", "dtype", "requests", "engine", "tokens/s, best", "median", "minipaged is … times as fast")
    shown = Table(*columns)
    for row in result["rows"]:
        low, high = row["ratio_spread"]
        ours = row["engine"] == "minipaged"
        ratio = "" if ours else f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        speed = (f"{row['best']:.0f}", f"{row['median']:.0f}")
        shown.add_row(row["model"], row["dtype"], row["cell"], row["engine"], *speed, ratio)
    return shown


def write_figure(result: dict[str, Any], out: Path) -> str:
    """``out``/peers.html: bars by engine, a panel per model and dtype."""
    try:
        from plotly import graph_objects, io
        from plotly.subplots import make_subplots
    except ModuleNotFoundError:
        return "No HTML figure: plotly is not installed (pip install plotly). The JSON has its data."
    groups = list(dict.fromkeys((row["model"], row["dtype"]) for row in result["rows"]))
    figure = make_subplots(rows=len(groups), cols=1, subplot_titles=[f"{model}, {dtype}" for model, dtype in groups])
    colors = dict(zip(result["engines"], ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=False))
    for number, group in enumerate(groups, start=1):
        for name in result["engines"]:
            rows = [row for row in result["rows"] if (row["model"], row["dtype"]) == group and row["engine"] == name]
            bar = graph_objects.Bar(
                name=name, x=[row["cell"] for row in rows], y=[row["median"] for row in rows],
                marker_color=colors[name], showlegend=number == 1, legendgroup=name,
            )  # fmt: skip
            figure.add_trace(bar, row=number, col=1)
        figure.update_yaxes(title="tokens/s, median", row=number, col=1)
    figure.update_layout(barmode="group", height=280 * len(groups), title="The same requests through several engines")
    path = out / "peers.html"
    io.write_html(figure, path, include_plotlyjs="directory", auto_open=False)
    return f"written to {path}"
