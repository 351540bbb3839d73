"""``minipaged bench``: measures speed, and prints and writes the results."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minipaged.errors import InvalidRequest
from minipaged.experiments.result import machine
from minipaged.experiments.result_text import number_text
from minipaged.workloads import (
    TraceRequest,
    alpaca_like,
    gamma,
    load_burstgpt,
    shared_prefix,
    sharegpt_like,
    trace,
    translation_like,
)

app = typer.Typer(help="Measure the engine's speed on this machine.", no_args_is_help=True)
Out = Annotated[Path | None, typer.Option(help="A folder for the results. Default: print only.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: smaller, noisier.")]
LENGTHS = {"sharegpt": sharegpt_like, "alpaca": alpaca_like, "translation": translation_like}


@app.command()
def scheduler(quick: Quick = False, out: Out = None) -> None:
    """Measure the scheduler's cost: microseconds per sequence and step, and memory growth over many requests."""
    from minipaged.bench.scheduler_cost import measure

    console = Console(highlight=False)
    result = measure(quick, lambda text: console.print(text, style="dim"))
    table = Table("sequences", "context", "recorder", "µs per sequence and step, best", "median")
    for row in result["costs"]:
        recorder = "on" if row["recorder"] else "off"
        figures = (row["sequences"], row["context"], recorder, row["best_us"], row["median_us"])
        table.add_row(*map(str, figures))
    console.print(table)
    memory = result["memory"]
    console.print(f"Memory after {memory['requests']} requests: {memory['grown_mib']:+.1f} MiB since the first tenth.")
    _write(out, "scheduler", result)


@app.command()
def peers(
    with_: Annotated[
        str, typer.Option("--with", help="Other engines, separated by commas: transformers, vllm, llama.cpp.")
    ] = "transformers",
    python: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: a Python that has the engine NAME installed; repeatable.")
    ] = None,
    models: Annotated[str, typer.Option(help="Model shapes to measure, separated by commas.")] = "",
    dtypes: Annotated[str, typer.Option(help="Data types, separated by commas.")] = "bfloat16,float32",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; every engine runs once in each.")] = 3,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Compare the throughput of several engines on the same requests and random weights."""
    from minipaged.bench import peers as bench

    console = Console(highlight=False)
    chosen = bench.engines(_names(with_), python or [])
    result = bench.measure(
        chosen, _names(models), _names(dtypes), repeats, quick, lambda text: console.print(text, style="dim")
    )
    console.print(bench.table(result))
    _write(out, "peers", result)
    if out is not None:
        console.print(bench.write_figure(result, out))


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="The API's address, with /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="The model's name. Default: the server's first.")] = "",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 2.0,
    cv: Annotated[float, typer.Option(help="Burstiness: 1 is Poisson; above 1, Gamma arrivals in bursts.")] = 1.0,
    duration: Annotated[float, typer.Option(help="Seconds during which requests arrive.")] = 30.0,
    lengths: Annotated[str, typer.Option(help=f"Distribution of lengths: {', '.join(LENGTHS)}.")] = "alpaca",
    burstgpt: Annotated[Path | None, typer.Option(help="Take arrival times and lengths from this trace.")] = None,
    prefix: Annotated[int, typer.Option(min=0, help="Length of a prefix that all prompts share, in words.")] = 0,
    max_prompt: Annotated[int, typer.Option(min=1, help="Cut longer prompts to this many words.")] = 512,
    max_output: Annotated[int, typer.Option(min=1, help="Cut longer outputs to this many tokens.")] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate the full length (minipaged and vLLM support it).")
    ] = False,
    goal_first: Annotated[float, typer.Option(help="Goodput: the highest TTFT, in seconds.")] = 1.0,
    goal_token: Annotated[float, typer.Option(help="Goodput: the highest mean time between tokens, in seconds.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A folder for serve.json and serve.html.")] = None,
) -> None:
    """Send requests at given times, without waiting for answers, and report latencies and goodput."""
    from minipaged.server import load

    requests = _requests(rate, cv, duration, lengths, burstgpt, prefix, max_prompt, max_output, seed)
    model = model or asyncio.run(load.first_model(url, api_key))
    target = load.Target(url, model, api_key, ignore_eos)
    console = Console(highlight=False)
    columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(requests))
        samples = asyncio.run(load.run(target, requests, lambda done: bar.update(task, completed=done)))
    result = load.summarize(samples, duration, load.Goal(goal_first, goal_token), target)
    table = Table("", "", title=f"{model} at {url}", title_justify="left")
    for row in result.rows:
        table.add_row(row.what, number_text(row))
    console.print(table)
    for error in result.assumed:
        console.print(f"  failed: {error}", markup=False)
    if out is not None:
        console.print(f"Written: {', '.join(map(str, result.write(out)))}", soft_wrap=True)


def _requests(
    rate: float, cv: float, duration: float, lengths: str, burstgpt: Path | None, prefix: int, max_prompt: int,
    max_output: int, seed: int,
) -> list[TraceRequest]:  # fmt: skip
    """The requests to send, with their arrival times. Raises `InvalidRequest`."""
    if lengths not in LENGTHS:
        raise InvalidRequest(f"lengths must be one of {', '.join(LENGTHS)}, not {lengths!r}")
    if burstgpt is not None:
        if prefix:
            raise InvalidRequest("--burstgpt sets the prompts' lengths; leave out --prefix")
        answered = (request for request in load_burstgpt(burstgpt, rate) if not request.failed)
        requests = [request for request in answered if request.arrival < duration]
    else:
        try:
            times = list(islice(gamma(rate, cv, duration, seed), 1_000_000))
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        drawn = LENGTHS[lengths](seed)
        requests = shared_prefix(drawn, times, prefix) if prefix else trace(drawn, times)
    if not requests:
        raise InvalidRequest("no request arrives in that time; give a higher --rate or a longer --duration")
    return [
        replace(
            request,
            num_prompt=max(1, min(request.num_prompt, max_prompt)),
            num_output=min(request.num_output, max_output),
            prefix_tokens=min(request.prefix_tokens, max_prompt),
        )
        for request in requests
    ]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _write(out: Path | None, name: str, result: dict[str, Any]) -> None:
    """Writes ``out``/NAME.json: the result, the command, the machine, its versions and its load average (``busy``)."""
    if out is None:
        return
    about = {
        "command": " ".join(["minipaged", *sys.argv[1:]]),
        "machine": machine(),
        "busy": [round(load, 2) for load in os.getloadavg()],
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(about | {"result": result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")
