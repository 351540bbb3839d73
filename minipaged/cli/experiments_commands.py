"""``minipaged experiments``: lists and runs the experiments, and prints their numbers beside the papers'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minipaged.errors import InvalidRequest
from minipaged.experiments import Result, catalogue, find, run
from minipaged.experiments.result_text import machine_text, number_text, paper_text

app = typer.Typer(help="Reproduce the papers' figures.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """List the experiments."""
    table = Table("name", "what it measures", "reproduces", "minutes")
    for entry in catalogue():
        table.add_row(entry.name, entry.title, entry.figure, f"{entry.minutes:g}")
    Console(highlight=False).print(table)


@app.command("run")
def run_(
    name: Annotated[str, typer.Argument(help="A name from the list, or 'all'.")],
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: smaller, noisier.")] = False,
    out: Annotated[Path, typer.Option(help="A folder for NAME.json and NAME.html.")] = Path("experiments"),
) -> None:
    """Run one experiment, or all."""
    console = Console(highlight=False)
    names = [entry.name for entry in catalogue()] if name == "all" else [find(name).name]
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the measurement, which may take many minutes
    except OSError as error:
        raise InvalidRequest(f"the results cannot be written: {error}") from error
    for one in names:
        result = _run(one, quick)
        show(console, result)
        try:
            written = result.write(out)
        except OSError as error:
            raise InvalidRequest(f"the results cannot be written: {error}") from error
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
        if len(written) == 1:
            console.print("No HTML figure: plotly is not installed (pip install plotly). The JSON has its data.")


def _run(name: str, quick: bool) -> Result:
    columns = TextColumn("{task.fields[name]}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0, name=name)
        return run(name, quick, lambda done, text: bar.update(task, completed=done, description=text))


def show(console: Console, result: Result) -> None:
    """Prints a result as a table, with the reasons for differences below it."""
    kind = "a quick run" if result.quick else "a full run"
    table = Table("", "paper", "here", title=f"{result.title} ({result.reproduces}), {kind}", title_justify="left")
    reasons = list(dict.fromkeys(row.why for row in result.rows if row.why))
    marks = {why: f" \\[{number}]" for number, why in enumerate(reasons, start=1)}
    for row in result.rows:
        table.add_row(row.what, paper_text(row).replace("\\", ""), number_text(row) + marks.get(row.why, ""))
    console.print(table)
    for number, why in enumerate(reasons, start=1):
        console.print(f"  \\[{number}] Why they differ: {why}.")
    if any(row.paper for row in result.rows):
        console.print("  The paper's numbers: * from a secondary source, the others read in the paper.")
    for sentence in result.assumed:
        console.print(f"  {sentence}")
    console.print(f"  {result.seconds:.0f} s on {machine_text(result)}.")
