"""What the tutorials show beside text: the engine's own lines, and simple drawings."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import dedent
from typing import Any

import minipaged

ROOT = Path(minipaged.__file__).resolve().parent.parent
# Light enough for dark text, and told apart by people who see colours differently (after Paul Tol's light scheme).
BLUE, SKY, GREEN, LIME, YELLOW, ORANGE, PINK = (
    "#77aadd", "#bfe6ff", "#44bb99", "#bbcc33", "#eedd88", "#ee8866", "#ffaabb"
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, YELLOW, PINK, LIME, "#cc99ff", "#bbbbbb")
EMPTY = "#eeeeee"


@dataclass(frozen=True)
class Markdown:
    """Text to be shown as a text cell is."""

    text: str

    def _repr_markdown_(self) -> str:
        return self.text


def needs(works: bool, otherwise: str) -> None:
    """Ends a tutorial that cannot run on this system: with one line that says so, and without an error."""
    if not works:
        print(otherwise)
        raise SystemExit(0)


def source(thing: Any) -> Markdown:
    """A function or class of the engine, as it stands in its file today."""
    lines = dedent(inspect.getsource(thing)).rstrip()
    file = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(ROOT).as_posix()
    return Markdown(f"`{thing.__qualname__}` in [`{file}`](../{file}):\n\n```python\n{lines}\n```")


def source_in(file: str, name: str) -> Markdown:
    """The same, of a module that cannot be imported everywhere: a top-level function, by its file and its name."""
    text = (ROOT / file).read_text(encoding="utf-8")
    (node,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    return Markdown(f"`{name}` in [`{file}`](../{file}):\n\n```python\n{ast.get_source_segment(text, node)}\n```")


@dataclass(frozen=True)
class Picture:
    """An SVG drawing; ``alt`` says in words what it shows."""

    svg: str
    alt: str

    def _repr_svg_(self) -> str:
        return self.svg


def box(x: float, y: float, width: float, height: float, colour: str, text: str = "") -> str:
    """A filled rectangle with a text in its middle."""
    rect = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}" stroke="#ffffff"/>'
    return rect + (label(x + width / 2, y + height / 2 + 4, text, "middle") if text else "")


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Text; ``anchor``: whether it starts, ends or has its middle at x."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "#666666") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="2"/>'


def drawing(width: float, height: float, shapes: Iterable[str], alt: str) -> Picture:
    """Puts shapes on a white sheet, so that it can be read on a dark page too."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" font-size="12" fill="#222222">',
        f"<title>{escape(alt)}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *shapes,
        "</svg>",
    ]
    return Picture("\n".join(lines), alt)
