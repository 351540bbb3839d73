"""``minipaged tutorials``: copies the tutorials out of the installation, to read, run and change them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minipaged.shipped import copy_tutorials

FOLDER = Path("minipaged-tutorials")


def tutorials(
    to: Annotated[Path, typer.Argument(help="A new folder.")] = FOLDER,
) -> None:
    """Copy the tutorials to a folder."""
    copy_tutorials(to)
    print(f"{to / 'README.md'} lists them and says how to use them.")
    print(f"python {to / '03_blocks_and_tables.py'}   runs one")
