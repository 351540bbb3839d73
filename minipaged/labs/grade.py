"""Grading all submissions of a class, side by side, one row for each whatever is wrong with it.

A student's ``results.json`` is in the format of Gradescope's autograders, and also what a later run goes on from: it is
written anew after each task, so that a crash or a time limit loses nothing.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import os
import re
import tempfile
import threading
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged import __version__
from minipaged.labs.checking import Result, check
from minipaged.labs.lab import Lab
from minipaged.labs.submissions import Submission

MAX_CAUSE = 1000  # characters
MAX_STEPS = 30  # of a failing trace
NOT_REACHED = "not reached: the grader was stopped before"
FAILED_HERE = "the grader failed here, which is not the student's fault"
Told = Callable[["Row"], None]


class Stopped(Exception):
    """The batch is over, by Ctrl-C."""


@dataclass
class Row:
    """A student's grade. It is ``finished`` when nothing would be gained by grading the same ``digest`` again; ``bug``
    is a traceback of the grader's own."""

    student: str
    digest: str
    results: list[Result] = field(default_factory=list)
    problem: str = ""
    bug: str = ""
    finished: bool = False

    @property
    def points(self) -> int:
        return sum(result.points for result in self.results)

    @property
    def cause(self) -> str:
        """Why it is not all points, in one sentence."""
        failed = (result.cause for result in self.results if result.status != "pass")
        return self.problem or next(failed, FAILED_HERE if self.bug else "" if self.finished else NOT_REACHED)


def grade(
    lab: Lab, submissions: list[Submission], out: Path, *, secret: bytes, jobs: int, again: bool, told: Told
) -> list[Row]:
    """Grades ``jobs`` submissions at a time. In ``out/students`` each has a folder, which says who is done already."""
    stop, rows = threading.Event(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="minipaged-grade-") as scratch, ThreadPoolExecutor(jobs) as pool:

        def one(number: int, submission: Submission) -> Row:
            file, path = Path(scratch, str(number), lab.file), out / "students" / submission.student / "results.json"
            return _grade_one(lab, submission, file, path, secret, again, stop)

        try:
            for future in as_completed([pool.submit(one, *item) for item in enumerate(submissions)]):
                rows.append(future.result())
                told(rows[-1])
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(rows, key=lambda row: row.student)


def _grade_one(
    lab: Lab, submission: Submission, file: Path, path: Path, secret: bytes, again: bool, stop: threading.Event
) -> Row:
    row = Row(submission.student, _digest(lab, submission, secret), problem=submission.problem)
    kept = None if again else _kept(path, row.digest)
    if kept:
        return kept

    def hear(result: Result) -> None:
        row.results.append(_trimmed(result))
        _write(path, gradescope(lab, row))
        if stop.is_set():
            raise Stopped

    path.parent.mkdir(parents=True, exist_ok=True)
    if row.problem:
        row.results = [Result(task.key, task.title, 0, task.points, "import", row.problem) for task in lab.tasks]
    else:
        _write(path, gradescope(lab, row))  # of an earlier submission nothing is left
        file.parent.mkdir()
        file.write_bytes(submission.source)
        try:
            check(lab, file, secret=secret, student=row.student, told=hear)
        except Stopped:
            raise
        except Exception:
            row.bug = traceback.format_exc()
    row.finished = not row.bug
    _write(path, gradescope(lab, row))
    return row


def _trimmed(result: Result) -> Result:
    """Without events, and with no more text than a page can show."""
    result.events = []
    result.trace = [step[:200] for step in result.trace[-MAX_STEPS:]]
    result.cause = result.cause if len(result.cause) <= MAX_CAUSE else result.cause[:MAX_CAUSE] + "…"
    return result


def _digest(lab: Lab, submission: Submission, secret: bytes) -> str:
    """Changes with all that a grade depends on."""
    facts = [__version__, lab.key, submission.student, submission.problem, submission.source.hex()]
    return hmac.new(secret, json.dumps(facts).encode(), hashlib.sha256).hexdigest()


def _kept(path: Path, digest: str) -> Row | None:
    """The finished row of an earlier run on the same submission."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["extra_data"]
        row = Row(**saved | {"results": [Result(**result) for result in saved["results"]]})
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return row if row.finished and row.digest == digest else None


def _write(path: Path, data: Any) -> None:
    """Whoever reads the file meanwhile, or after a crash, finds the old text or the new one, not half of it."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(data, indent=2), encoding="utf-8")
    os.replace(draft, path)


# --- formats ------------------------------------------------------------------------------------------------------


def gradescope(lab: Lab, row: Row) -> dict[str, Any]:
    """What Gradescope calls ``results.json``, with what a later run needs as ``extra_data``."""
    done = {result.task: result for result in row.results}
    nothing = FAILED_HERE if row.bug else NOT_REACHED
    tests = []
    for task in lab.tasks:
        result = done.get(task.key, Result(task.key, task.title, 0, task.points, "skip", nothing))
        tests.append({
            "name": f"{task.key} {task.title}", "number": task.key.removeprefix("A"), "score": result.points,
            "max_score": task.points, "status": "passed" if result.status == "pass" else "failed",
            "output": said(result), "output_format": "text", "visibility": "visible",
        })  # fmt: skip
    results = [result.to_dict() for result in row.results]
    extra = {"student": row.student, "digest": row.digest, "problem": row.problem, "finished": row.finished}
    return {"visibility": "visible", "tests": tests, "extra_data": extra | {"results": results}}


def said(result: Result) -> str:
    """A result in words: the cause, the shortest trace that shows it, and what the file printed."""
    lines = [result.cause or "passed", *(f"    {step}" for step in result.trace)]
    if result.output and result.status != "pass":
        lines += ["your file printed:", result.output]
    return "\n".join(lines)


def write_csv(lab: Lab, rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "points", "of", *(task.key for task in lab.tasks), "cause"])
        for row in rows:
            points = {result.task: result.points for result in row.results}
            cells = [points.get(task.key, "") for task in lab.tasks]
            writer.writerow([_cell(row.student), row.points, lab.points, *cells, _cell(row.cause)])


def _cell(text: str) -> str:
    """A spreadsheet takes no text of a student's for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def write_junit(lab: Lab, rows: list[Row], path: Path) -> None:
    suites = xml.Element("testsuites")
    for row in rows:
        suite = xml.SubElement(suites, "testsuite", name=_legal(row.student), tests=str(len(lab.tasks)))
        done = {result.task: result for result in row.results}
        for task in lab.tasks:
            result = done.get(task.key)
            seconds = f"{result.seconds if result else 0:.3f}"
            name = f"{task.key} {task.title}"
            case = xml.SubElement(suite, "testcase", classname=_legal(row.student), name=name, time=seconds)
            if result is None:
                xml.SubElement(case, "error", message=FAILED_HERE).text = _legal(row.bug)
            elif result.status in ("blocked", "skip"):
                xml.SubElement(case, "skipped", message=_legal(result.cause))
            elif result.status != "pass":
                xml.SubElement(case, "failure", message=_legal(result.cause)).text = _legal(said(result))
    xml.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def _legal(text: str) -> str:
    """Without the characters that XML has no way to say."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
