"""The events and the state as TypeScript interfaces: what visualizer/static/types.d.ts says between its markers.

python -m tests.visualizer.script_types --write
"""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minipaged.events.reducer import GroupState, SeqState
from minipaged.events.types import EVENT_TYPES

FILE = Path(__file__).parents[2] / "visualizer" / "static" / "types.d.ts"
BEGIN, END = "// --- from Python: begin ---\n", "// --- from Python: end ---\n"
PLAIN = {int: "number", float: "number", str: "string", bool: "boolean", Any: "any", type(None): "null"}


def typescript(hint: Any) -> str:
    """A Python annotation as a TypeScript type."""
    if hint in PLAIN:
        return PLAIN[hint]
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(f'"{value}"' for value in inner)
    if get_origin(hint) is list:
        element = typescript(inner[0])
        return f"({element})[]" if " " in element else f"{element}[]"
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(typescript, inner))
    raise TypeError(f"no TypeScript for {hint}")


def interface(name: str, cls: type, kind: str = "") -> str:
    """One interface. A field of an event that has a default is optional: old recordings do not have it."""
    hints = get_type_hints(cls)
    fields = [f'type: "{kind}"'] if kind else []
    for field in dataclasses.fields(cls):
        default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        fields.append(f"{field.name}{'?' if kind and default else ''}: {typescript(hints[field.name])}")
    return f"interface {name} {{ {'; '.join(fields)} }}\n"


def interfaces() -> str:
    parts = [interface(cls.__name__, cls, kind) for kind, cls in EVENT_TYPES.items()]
    union = f"type EngineEvent = {' | '.join(cls.__name__ for cls in EVENT_TYPES.values())};\n"
    return "".join([*parts, union, interface("Seq", SeqState), interface("Group", GroupState)])


def rewritten(text: str) -> str:
    """The file's text with the interfaces between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{FILE.name} has no markers"
    return before + BEGIN + interfaces() + END + after


if __name__ == "__main__":
    text = rewritten(FILE.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(text, encoding="utf-8")
    else:
        print(interfaces(), end="")
