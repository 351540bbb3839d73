"""The labs: write a part of the engine yourself, and watch it run inside the real one.

``README.md`` in this folder says how a lab is made. `catalogue` finds them; ``minipaged lab`` is the way in.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from minipaged.errors import InvalidRequest
from minipaged.labs.lab import Lab

HERE = Path(__file__).parent


def catalogue() -> list[Lab]:
    """All labs, in order."""
    folders = sorted(path.parent.name for path in HERE.glob("a*/lab.py"))
    return [import_module(f"minipaged.labs.{name}.lab").LAB for name in folders]


def find(key: str) -> Lab:
    """The lab of this name, in capitals or not. `InvalidRequest` if there is none."""
    labs = {lab.key: lab for lab in catalogue()}
    lab = labs.get(key.upper())
    if lab is None:
        raise InvalidRequest(f"there is no lab {key!r}; there are {', '.join(labs)}")
    return lab
