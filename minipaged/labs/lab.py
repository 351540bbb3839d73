"""What a lab is: its tasks, where its code comes from, and the bugs that its checks must notice.

Starter and reference are made from the same source: functions with the comment ``# lab: A1.2`` above them are the
solution of task A1.2, and lose their body in the starter. So the two cannot drift apart.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARK = re.compile(r"\s*# lab: (A\d\.\d(?:, A\d\.\d)*)\s*$")
LEVELS = 3  # of hints


@dataclass(frozen=True)
class Source:
    """A module of which a lab's file is made: all of it, or the top-level definitions in ``names``."""

    module: str
    names: tuple[str, ...] = ()

    def text(self) -> str:
        found = find_spec(self.module)  # not imported: a lab's text is there without torch or Triton
        assert found is not None and found.origin is not None
        text = Path(found.origin).read_text(encoding="utf-8")
        if not self.names:
            return text
        lines, body = text.splitlines(), ast.parse(text).body
        spans = {name: node for node in body for name in _defines(node)}
        cuts = [slice(first(spans[name], lines), spans[name].end_lineno) for name in self.names]
        return "\n\n\n".join("\n".join(lines[cut]) for cut in cuts)


@dataclass(frozen=True)
class Task:
    """Something to write. It is only looked at when the tasks it ``needs`` pass.

    ``seconds`` is what the reference takes; five times as much (ten seconds at least) is the limit.
    """

    key: str
    title: str
    points: int
    needs: tuple[str, ...] = ()
    seconds: float = 1.0


@dataclass(frozen=True)
class Mutant:
    """A bug that a published engine had: ``old`` → ``new`` in the reference. The checks of ``task`` must fail."""

    bug: str
    task: str
    old: str
    new: str

    def applied(self, reference: str) -> str:
        if reference.count(self.old) != 1:
            raise ValueError(f"the mutant fits {reference.count(self.old)} places of the reference, not one")
        return reference.replace(self.old, self.new)


@dataclass(frozen=True)
class Lab:
    """A lab in ``minipaged/labs/<folder>/``, beside its ``README.md``, ``hints.md`` and ``checks.py``.

    ``file`` is what the student edits, made of ``sources`` (below ``header``, if given). ``preload``: packages that the
    file may import although they are not part of Python. ``engine`` gives the engine's own code under the names that
    the checks use; they must pass on it too. ``needs`` returns why the lab cannot be done on this machine, or "".
    """

    key: str
    title: str
    minutes: int
    file: str
    sources: tuple[Source, ...]
    tasks: tuple[Task, ...]
    mutants: tuple[Mutant, ...]
    header: str = ""
    preload: tuple[str, ...] = ()
    memory: int = 1 << 30  # bytes of addresses that the student's process may use
    environment: dict[str, str] = field(default_factory=dict)
    engine: Callable[[], dict[str, Any]] | None = None
    needs: Callable[[], str] = lambda: ""

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / self.key.lower()

    @property
    def points(self) -> int:
        return sum(task.points for task in self.tasks)

    def task(self, key: str) -> Task:
        return next(task for task in self.tasks if task.key == key.upper())

    def checks(self) -> dict[str, Callable[..., None]]:
        """Task → the function that checks it, given a `checking.Trial`."""
        return import_module(f"minipaged.labs.{self.key.lower()}.checks").CHECKS

    @property
    def text(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")

    def hints(self) -> dict[str, list[str]]:
        """Task → its hints, from a nudge to nearly the answer: the parts of ``hints.md`` between ``---`` lines."""
        text = (self.folder / "hints.md").read_text(encoding="utf-8")
        _, *parts = re.split(r"^## (A\d\.\d)\b.*$", text, flags=re.MULTILINE)
        sections = zip(parts[::2], parts[1::2], strict=True)
        return {key: [hint.strip() for hint in section.split("\n---\n")] for key, section in sections}

    def marked(self) -> str:
        """The reference, marks included."""
        return self.header + "\n\n\n".join(source.text().strip("\n") for source in self.sources) + "\n"

    def reference(self) -> str:
        """A file that solves the lab."""
        return "\n".join(line for line in self.marked().splitlines() if not MARK.match(line)) + "\n"

    def starter(self) -> str:
        """The file that students begin with: what they are to write raises ``NotImplementedError``."""
        lines = self.marked().splitlines()
        for node, task in sorted(self.spans().items(), key=lambda item: -item[0].lineno):
            body = node.body[1:] if _has_docstring(node) else node.body
            start = node.body[0].end_lineno if _has_docstring(node) else node.body[0].lineno - 1
            indent = " " * node.body[0].col_offset
            assert node.end_lineno is not None and start is not None and body
            lines[start : node.end_lineno] = [f'{indent}raise NotImplementedError("{task}")']
        return "\n".join(line for line in lines if not MARK.match(line)) + "\n"

    def functions(self, task: str) -> list[str]:
        """Names of the functions that solve a task, with their class: ``BlockPool.allocate``."""
        tree, names = ast.parse(self.marked()), []
        own = {node.lineno for node, keys in self.spans().items() if task in keys.split(", ")}
        for top in tree.body:
            inside = top.body if isinstance(top, ast.ClassDef) else [top]
            prefix = f"{top.name}." if isinstance(top, ast.ClassDef) else ""
            names += [prefix + node.name for node in inside if isinstance(node, ast.FunctionDef) and node.lineno in own]
        return names

    def spans(self) -> dict[ast.FunctionDef, str]:
        """Functions of `marked` → the task whose solution they are ("A4.1, A4.3" for two)."""
        text = self.marked()
        lines, found = text.splitlines(), {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                above = lines[first(node, lines)]
                if mark := MARK.match(above):
                    found[node] = mark[1]
        return found


def first(node: ast.stmt, lines: list[str]) -> int:
    """The line (from 0) where a definition begins, its decorators and a mark above them included."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
    return start - 1 if start and MARK.match(lines[start - 1]) else start


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _has_docstring(node: ast.FunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None
