"""The author's gate: is a lab fair, and do its checks notice what they must?"""

from __future__ import annotations

import linecache
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipaged.labs.checking import Result, check
from minipaged.labs.lab import LEVELS, Lab


def verify(lab: Lab) -> Iterator[tuple[str, str]]:
    """What is looked at, and what is wrong with it ("" if nothing), one after the other."""
    yield "texts and hints", _texts(lab)
    reason = lab.needs()
    if reason:
        yield f"skipped: {reason}", ""
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, lab.file)
        file.write_text(lab.starter(), encoding="utf-8")
        for task in lab.tasks:
            (result,) = check(lab, quickly(lab, file), tasks=[task.key], shrink=False)
            yield f"the starter fails {task.key}", "" if result.status == "fail" else _told(result)
        file.write_text(lab.reference(), encoding="utf-8")
        alone = [lab.tasks[-1].key]
        for result in check(lab, file, tasks=alone if lab.preload else None):
            yield f"the reference passes {result.task}", "" if result.status == "pass" else _told(result)
        if lab.preload:
            for result in check(lab, quickly(lab, file), tasks=[task.key for task in lab.tasks[:-1]]):
                yield f"the reference passes {result.task}", "" if result.status == "pass" else _told(result)
        if lab.engine is not None:
            for result in check(lab, lab.engine()):
                yield f"the engine passes {result.task}", "" if result.status == "pass" else _told(result)
        for mutant in lab.mutants:
            try:
                file.write_text(mutant.applied(lab.reference()), encoding="utf-8")
            except ValueError as error:
                yield f"noticed: {mutant.bug}", str(error)
                continue
            (result,) = check(lab, quickly(lab, file), tasks=[mutant.task], shrink=False)
            yield f"noticed: {mutant.bug}", "" if result.status in ("fail", "limit") else _told(result)


def quickly(lab: Lab, file: Path) -> Path | dict[str, Any]:
    """The file; or its names, run in this process, if one of its own would load torch each time. It is our own code.

    What ``lab.environment`` says must hold since this process began, as it does for the student's.
    """
    if not lab.preload or not lab.environment.items() <= os.environ.items():
        return file
    names: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    linecache.checkcache(str(file))  # Triton reads its kernels' source
    exec(compile(file.read_text(encoding="utf-8"), file, "exec"), names)
    return names


def _told(result: Result) -> str:
    return f"{result.task}: {result.status} {result.cause}".strip()


def _texts(lab: Lab) -> str:
    hints = lab.hints()
    for task in lab.tasks:
        levels = hints.get(task.key, [])
        if len(levels) != LEVELS or not all(levels):
            return f"{task.key} has {len(levels)} hints, not {LEVELS}"
        if f"## {task.key} " not in lab.text:
            return f"README.md has no section '## {task.key} …'"
        if task.points < 1 or any(key not in {other.key for other in lab.tasks} for key in task.needs):
            return f"{task.key} is worth {task.points} points and needs {task.needs}"
    if list(lab.checks()) != [task.key for task in lab.tasks]:
        return "checks.py does not check these tasks, in this order"
    if len(lab.mutants) < 3 or lab.minutes <= 0:
        return "a lab has three mutants at least, and states the minutes that it takes"
    unwritten = [task.key for task in lab.tasks if not any(task.key in keys for keys in lab.spans().values())]
    return "" if len(unwritten) < len(lab.tasks) else "no function is marked as a task's solution"
