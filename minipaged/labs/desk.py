"""A student's folder of one lab: the file, the progress, and the recording of the last failure."""

from __future__ import annotations

import ast
import difflib
import json
import zipfile
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from minipaged.errors import InvalidRequest
from minipaged.labs.checking import Result, check, save_recording
from minipaged.labs.lab import Lab, first


@dataclass
class Progress:
    """What is kept between runs, in ``progress.json``."""

    passed: dict[str, int] = field(default_factory=dict)  # task → points, when last checked
    hints: dict[str, int] = field(default_factory=dict)  # task → how many hints have been read
    gave_up: list[str] = field(default_factory=list)  # tasks whose solution has been read before they passed
    checks: int = 0


class Desk:
    """The folder ``a1`` (say) below ``parent``, or ``parent`` itself if that is it."""

    def __init__(self, lab: Lab, parent: Path) -> None:
        self.lab = lab
        name = lab.key.lower()
        self.folder = parent if parent.name == name and (parent / lab.file).exists() else parent / name
        self.file = self.folder / lab.file
        self.recording = self.folder / "failure.jsonl"
        self._progress = self.folder / "progress.json"

    @property
    def started(self) -> bool:
        return self.file.is_file()

    def start(self) -> None:
        """Writes starter and text. `InvalidRequest` if the lab has been started here already."""
        if self.started:
            raise InvalidRequest(f"{self.file} is there already; 'minipaged lab reset {self.lab.key}' begins again")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file.write_text(self.lab.starter(), encoding="utf-8")
            (self.folder / "README.md").write_text(self.lab.text, encoding="utf-8")
            self.save(Progress())
        except OSError as error:
            raise InvalidRequest(f"the lab cannot be written here: {error}") from error

    def require(self) -> Desk:
        if not self.started:
            raise InvalidRequest(f"there is no {self.file}; 'minipaged lab start {self.lab.key}' writes it")
        return self

    def progress(self) -> Progress:
        """`InvalidRequest` for a progress file that somebody has edited beyond recognition."""
        if not self._progress.exists():
            return Progress()
        try:
            return Progress(**json.loads(self._progress.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{self._progress} cannot be read ({error}); delete it to begin anew") from error

    def save(self, progress: Progress) -> None:
        self._progress.write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")

    def check(self, told=lambda result: None) -> list[Result]:
        """Checks the file, and keeps points and the recording of the first failing trace that has one."""
        progress = self.progress()
        results = check(self.lab, self.require().file, told=told)
        progress.checks += 1
        progress.passed = {result.task: result.points for result in results if result.status == "pass"}
        self.recording.unlink(missing_ok=True)
        for result in results:
            if result.events:
                save_recording(result.events, self.recording)
                break
        self.save(progress)
        return results

    def hint(self, task: str) -> tuple[int, str]:
        """The next hint for a task and its number; the last one again when all have been read."""
        progress, hints = self.progress(), self.lab.hints()[task]
        level = min(progress.hints.get(task, 0) + 1, len(hints))
        progress.hints[task] = level
        self.save(progress)
        return level, hints[level - 1]

    def diff(self, task: str, give_up: bool = False) -> str:
        """From the student's functions for a task to the reference's. `InvalidRequest` before it has passed."""
        progress = self.progress()
        if task not in progress.passed:
            if not give_up:
                raise InvalidRequest(f"{task} has not passed yet; --give-up shows a solution all the same")
            progress.gave_up = sorted({*progress.gave_up, task})
            self.save(progress)
        mine, theirs = self.file.read_text(encoding="utf-8"), self.lab.reference()
        lines: list[str] = []
        names = self.lab.functions(task)
        if not names:
            return "This task has no code of its own."
        for name in names:
            before, after = _function(mine, name), _function(theirs, name)
            names_of = {"fromfile": f"yours: {name}", "tofile": f"reference: {name}"}
            lines += difflib.unified_diff(before, after, **names_of, n=100, lineterm="")
        return "\n".join(lines) or "Yours is the reference, line by line."

    def reset(self) -> Path:
        """A new starter. Returns where the old file went."""
        text = self.require().file.read_text(encoding="utf-8")
        names = (self.file.with_suffix(f".backup-{number}.py") for number in count(1))
        backup = next(name for name in names if not name.exists())
        backup.write_text(text, encoding="utf-8")
        self.file.write_text(self.lab.starter(), encoding="utf-8")
        progress = self.progress()
        progress.passed, progress.checks = {}, 0
        self.save(progress)
        return backup

    def pack(self) -> Path:
        """A ZIP to hand in: the file and the progress, in a folder of the lab's name."""
        path = self.require().folder / f"{self.lab.key.lower()}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in (self.file, self._progress):
                if file.exists():
                    archive.write(file, f"{self.lab.key.lower()}/{file.name}")
        return path


def _function(text: str, name: str) -> list[str]:
    """The lines of a function, named with its class: ``BlockPool.allocate``. None of them if it is not there."""
    lines = text.splitlines()
    try:
        node: ast.AST = ast.parse(text)
    except SyntaxError:
        return lines
    for part in name.split("."):
        inside = [n for n in getattr(node, "body", ()) if getattr(n, "name", None) == part]
        if not inside:
            return []
        node = inside[0]
    assert isinstance(node, ast.stmt)
    return lines[first(node, lines) : node.end_lineno]
