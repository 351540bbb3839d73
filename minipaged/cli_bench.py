"""``minipaged bench``: measurements, one command each."""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Measure."""


@app.command()
def serve() -> None:
    pass
