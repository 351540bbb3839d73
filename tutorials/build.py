"""Runs the tutorials and writes a page of each: `NN_topic.py` → `NN_topic.md`, and its pictures.

    python tutorials/build.py              all of them
    python tutorials/build.py 03           those whose name begins so
    python tutorials/build.py --check      writes nothing; exit code 1 if a page is not what its tutorial gives today

A tutorial is a Python script in cells: `# %% [markdown]` begins a text, `# %%` code. What a code cell prints goes below
it, and then what its last line evaluates to: an object with ``_repr_markdown_`` or ``_repr_svg_`` is shown as such, as
in a notebook. A tutorial that cannot run on this system ends itself in one line (`show.needs`); no page is made then,
and the exit code is 1 too.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))  # tutorials import `show`, which lies here


class CannotRun(Exception):
    """A tutorial needs another system than this one; says what."""


class Cell(NamedTuple):
    is_code: bool
    line: int  # of its first line in the file, from 1
    text: str


def cells(script: str) -> Iterator[Cell]:
    """The cells of a script. A text's lines come without their comment signs."""
    line = 1
    for part in re.split(r"(?m)^(?=# %%)", script):
        head, _, body = part.partition("\n")
        if head.strip() == "# %% [markdown]":
            yield Cell(False, line + 1, re.sub(r"(?m)^# ?", "", body).strip())
        elif head.strip() == "# %%":
            yield Cell(True, line + 1, body.strip("\n"))
        elif part.strip():
            raise ValueError(f"line {line}: a cell begins with '# %%' or '# %% [markdown]', not with {head!r}")
        line += part.count("\n")


def run(cell: Cell, path: Path, names: dict[str, Any]) -> tuple[str, Any]:
    """What the cell prints, and the value of its last line if that is an expression."""
    tree = ast.increment_lineno(ast.parse(cell.text), cell.line - 1)  # so that errors name the right line
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        try:
            exec(compile(tree, path, "exec"), names)
            value = eval(compile(ast.Expression(last.value), path, "eval"), names) if last else None
        except SystemExit:
            raise CannotRun(printed.getvalue().strip()) from None
    return printed.getvalue().rstrip(), value


def build(path: Path) -> dict[Path, str]:
    """Runs a tutorial and returns the files made of it: path → content. Raises `CannotRun`."""
    parts = [f"<!-- Made from {path.name} by build.py: edit that file, then run it. -->"]
    pictures: dict[Path, str] = {}
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    for cell in cells(path.read_text(encoding="utf-8")):
        if not cell.is_code:
            parts.append(cell.text)
            continue
        parts.append(f"```python\n{cell.text}\n```")
        printed, value = run(cell, path, names)
        if printed:
            parts.append(f"```text\n{printed}\n```")
        if hasattr(value, "_repr_svg_"):
            picture = path.parent / "pictures" / f"{path.stem}-{len(pictures) + 1}.svg"
            pictures[picture] = value._repr_svg_() + "\n"
            parts.append(f"![{value.alt}](pictures/{picture.name})")
        elif hasattr(value, "_repr_markdown_"):
            parts.append(value._repr_markdown_())
        elif value is not None:
            parts.append(f"```text\n{value!r}\n```")
    return {path.with_suffix(".md"): "\n\n".join(parts) + "\n"} | pictures


def is_stale(path: Path, content: str) -> bool:
    """Whether a file is not what it should be; says what differs."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(old.splitlines(), content.splitlines(), "committed", "today", lineterm="", n=1)
    changes = list(lines)
    if changes:
        print(f"{path.name} is stale; run python tutorials/build.py", *changes[:20], sep="\n  ")
    return bool(changes)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the tutorials' pages by running them.")
    parser.add_argument("prefix", nargs="*", default=[""], help="which ones: how their names begin")
    parser.add_argument("--check", action="store_true", help="only tell whether the pages are up to date")
    args = parser.parse_args()
    # Tutorials 5 and 6 set this themselves; but here another may have imported triton before them, when it is too late.
    os.environ["TRITON_INTERPRET"] = "1"
    stale = refused = False
    for path in sorted(FOLDER.glob("[0-9][0-9]_*.py")):
        if not path.name.startswith(tuple(args.prefix)):
            continue
        try:
            made = build(path)
        except CannotRun as reason:
            print(f"{path.name}: not {'checked' if args.check else 'made'}. {reason}", file=sys.stderr)
            refused = True
            continue
        for file, content in made.items():
            if args.check:
                stale |= is_stale(file, content)
            else:
                file.parent.mkdir(exist_ok=True)
                file.write_text(content, encoding="utf-8")
                print(file.relative_to(FOLDER.parent))
    return int(stale or refused)


if __name__ == "__main__":
    sys.exit(main())
