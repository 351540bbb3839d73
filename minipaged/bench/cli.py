"""``minipaged bench``: what each command prints, and the JSON it writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minipaged.experiments.result import machine

app = typer.Typer(help="Measure the engine's speed on this machine.", no_args_is_help=True)
Out = Annotated[Path | None, typer.Option(help="A folder for the results; without it they are only printed.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: smaller, noisier.")]


@app.command()
def scheduler(quick: Quick = False, out: Out = None) -> None:
    """What deciding costs: microseconds a sequence a step without a model, and memory over many requests."""
    from minipaged.bench.scheduler import measure

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
    write(out, "scheduler", result)


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
    write(out, "peers", result)
    if out is not None:
        console.print(bench.write_figure(result, out))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def write(out: Path | None, name: str, result: dict[str, Any]) -> None:
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
