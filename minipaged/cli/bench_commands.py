"""``minipaged bench``: what each command prints, and what it writes."""

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
Out = Annotated[Path | None, typer.Option(help="A folder for the results; without it they are only printed.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: smaller, noisier.")]
LENGTHS = {"sharegpt": sharegpt_like, "alpaca": alpaca_like, "translation": translation_like}


@app.command()
def scheduler(quick: Quick = False, out: Out = None) -> None:
    """What deciding costs: microseconds a sequence a step without a model, and memory over many requests."""
    from minipaged.bench.scheduler_cost import measure

    console = Console(highlight=False)
    result = measure(quick, lambda text: console.print(text, style="dim"))
    table = Table("sequences", "context", "recorder", "µs a sequence a step, best", "median")
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
        str, typer.Option("--with", help="Other engines, of: transformers, vllm, llama.cpp.")
    ] = "transformers",
    python: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: the Python that has this engine installed; repeatable.")
    ] = None,
    models: Annotated[str, typer.Option(help="Shapes to measure, separated by commas.")] = "",
    dtypes: Annotated[str, typer.Option(help="Separated by commas.")] = "bfloat16,float32",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every engine has its turn.")] = 3,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """The same requests through several engines, side by side on random weights."""
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
    model: Annotated[str, typer.Option(help="Default: the server's first.")] = "",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 2.0,
    cv: Annotated[float, typer.Option(help="Burstiness: 1 is Poisson, above it Gamma arrivals in bursts.")] = 1.0,
    duration: Annotated[float, typer.Option(help="Seconds during which requests come.")] = 30.0,
    lengths: Annotated[str, typer.Option(help=f"Lengths like those of: {', '.join(LENGTHS)}.")] = "alpaca",
    burstgpt: Annotated[Path | None, typer.Option(help="Times and lengths from this trace instead.")] = None,
    prefix: Annotated[int, typer.Option(min=0, help="Words that all prompts begin with.")] = 0,
    max_prompt: Annotated[int, typer.Option(min=1, help="Cut prompts to so many words.")] = 512,
    max_output: Annotated[int, typer.Option(min=1, help="Cut outputs to so many tokens.")] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Outputs as long as asked for (minipaged and vLLM understand it).")
    ] = False,
    goal_first: Annotated[float, typer.Option(help="Goodput: seconds to the first token, at most.")] = 1.0,
    goal_token: Annotated[float, typer.Option(help="Goodput: seconds between tokens in the mean, at most.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where serve.json and serve.html go.")] = None,
) -> None:
    """Send requests at their times, whatever the server's state, and report latencies and goodput."""
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
    """What to send and when. Raises `InvalidRequest`."""
    if lengths not in LENGTHS:
        raise InvalidRequest(f"lengths must be one of {', '.join(LENGTHS)}, not {lengths!r}")
    if burstgpt is not None:
        if prefix:
            raise InvalidRequest("a trace says what its prompts are; leave out --prefix")
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
        raise InvalidRequest("no request comes in that time; give a higher --rate or a longer --duration")
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
    """``out``/NAME.json, with the machine, the versions, and how busy others kept it (the load average)."""
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
