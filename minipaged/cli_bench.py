"""``minipaged bench serve``: load for any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minipaged.errors import InvalidRequest
from minipaged.experiments.cli import number_text
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

LENGTHS = {"sharegpt": sharegpt_like, "alpaca": alpaca_like, "translation": translation_like}


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
