"""Checks a student's file, task by task: seeds, limits, shrinking of what fails, and the recording of it."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from minipaged.events import EngineError, Event, Recorder, StepFinished, StepStarted
from minipaged.labs.lab import Lab, Task
from minipaged.labs.student import LimitReached, Local, NotImportable, Student, StudentError, Violation

MIN_SECONDS = 10.0  # for a task, however fast the reference is
TIMES_REFERENCE = 5
SHRINK_RUNS = 400  # at most, to make a failing trace short
SHRINK_SECONDS = 30.0  # and no longer; what it has become by then is shown
PRACTICE = b"practice"  # the secret with which students check at home

Trace = Sequence[Any]  # steps of any kind that `Trial.search`'s ``run`` understands, independent of one another


@dataclass
class Tape:
    """What happens in one run of a trace: lines for the reader, events for the visualizer."""

    lines: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    _step: int = 0

    def begin(self, line: str) -> None:
        """The next call, a step of its own in the visualizer. For traces without an engine that makes steps."""
        if self._step:
            self.record(StepFinished(self._step - 1, 0, 0.0))
        self.record(StepStarted(self._step))
        self._step += 1
        self.say(line)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def record(self, event: Event) -> None:
        """Can subscribe to an engine, which does not announce itself: give it ``engine.started_event()`` first."""
        self.events.append(event)


@dataclass
class Result:
    """A task's outcome. ``status``: "pass", "fail", "blocked", "limit", "import" or "skip", the latter with a cause."""

    task: str
    title: str
    points: int
    max_points: int
    status: str
    cause: str = ""
    trace: list[str] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0
    events: list[Event] = field(default_factory=list, repr=False)  # of the failing trace

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the events."""
        return {key: value for key, value in asdict(self).items() if key != "events"}


class Trial:
    """One task's check at work: `student` to ask, `random` to choose by, `search` to find failing traces with."""

    def __init__(
        self, lab: Lab, task: Task, open_student: Callable[[float], Any], seed: int, shrink: bool = True
    ) -> None:
        self.lab, self.task, self.seed, self.shrinks = lab, task, seed, shrink
        self.random = Random(seed)
        self.seconds = max(MIN_SECONDS, TIMES_REFERENCE * task.seconds)
        self.tape = Tape()
        self.output = ""
        self._open, self._student = open_student, None

    @property
    def student(self) -> Any:
        """The student's process: one for many calls, another after it has ended. See `student.Student`."""
        if self._student is None or not self._student.alive:
            self.close()
            self._student = self._open(self.seconds)
        return self._student

    def search(self, traces: Iterable[Trace], run: Callable[[Trace, Tape], None]) -> None:
        """Runs ``run(trace, tape)`` for every trace. The first that breaks a rule is made short, and its `Violation`
        raised; `tape` is then what happened in the short one."""
        for trace in traces:
            found = self._attempt(trace, run)
            if found is None:
                continue
            if self.shrinks and not isinstance(found[0], LimitReached):
                trace, found = self._shrink(list(trace), found, run)
            violation, self.tape = found
            raise violation

    def _attempt(self, trace: Trace, run: Callable[[Trace, Tape], None]) -> tuple[Violation, Tape] | None:
        tape = Tape()
        try:
            run(trace, tape)
        except StudentError as error:
            return error.violation(), tape
        except Violation as violation:
            return violation, tape
        return None

    def _shrink(
        self, trace: list[Any], found: tuple[Violation, Tape], run: Callable[[Trace, Tape], None]
    ) -> tuple[list[Any], tuple[Violation, Tape]]:
        """Leaves out what it can while the same rule is broken: halves first, then quarters, at last single steps."""
        rule, left = found[0].rule, SHRINK_RUNS
        patience = time.monotonic() + SHRINK_SECONDS
        size = max(1, len(trace) // 2)
        while True:
            start, shorter = 0, False
            while start < len(trace) and left and time.monotonic() < patience:
                left -= 1
                candidate = trace[:start] + trace[start + size :]
                again = self._attempt(candidate, run)
                if again and again[0].rule == rule:
                    trace, found, shorter = candidate, again, True
                else:
                    start += size
            if not left or time.monotonic() >= patience or (size == 1 and not shorter):
                return trace, found
            size = max(1, size // 2)

    def close(self) -> None:
        if self._student is not None:
            self._student.close()
            self.output = self._student.output() or self.output
            self._student = None


def seed_of(secret: bytes, student: str, lab: str, task: str) -> int:
    """The seed of a task's tests: hidden from who does not know the secret, the same every time for who does."""
    digest = hmac.new(secret, f"{student}|{lab}|{task}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big")


def check(
    lab: Lab,
    file: Path | dict[str, Any],
    *,
    secret: bytes = PRACTICE,
    student: str = "",
    tasks: Iterable[str] | None = None,
    shrink: bool = True,
    told: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Checks all tasks, or those named (whose needs then count as fulfilled). ``told`` hears of each when it is done.
    Without ``shrink`` failing traces stay as long as they are.

    ``file`` is a student's; a dict of classes and functions runs in this process, for the engine's own code.
    """
    chosen = [task for task in lab.tasks if tasks is None or task.key in tasks]
    results: list[Result] = []
    missing = lab.needs()
    for task in chosen:
        passed = {result.task for result in results if result.status == "pass"}
        lacking = [key for key in task.needs if key not in passed] if tasks is None else []
        if missing:
            result = Result(task.key, task.title, 0, task.points, "skip", missing)
        elif lacking:
            result = Result(task.key, task.title, 0, task.points, "blocked", f"blocked by {', '.join(lacking)}")
        else:
            result = _check_task(lab, task, file, seed_of(secret, student, lab.key, task.key), shrink)
        results.append(result)
        told(result)
    return results


def _check_task(lab: Lab, task: Task, file: Path | dict[str, Any], seed: int, shrink: bool) -> Result:
    trial = Trial(lab, task, lambda seconds: open_student(lab, file, seconds), seed, shrink)
    started = time.monotonic()
    status, cause = "pass", ""
    try:
        lab.checks()[task.key](trial)
    except StudentError as error:
        violation = error.violation()
        status, cause = ("limit" if isinstance(violation, LimitReached) else "fail"), str(violation)
    except NotImportable as error:
        status, cause = "import", str(error)
    except LimitReached as error:
        status, cause = "limit", str(error)
    except Violation as error:
        status, cause = "fail", str(error)
    finally:
        trial.close()
    events = trial.tape.events
    if cause and events:
        events = [*events, EngineError(cause)]
    points = task.points if status == "pass" else 0
    seconds = time.monotonic() - started
    lines = trial.tape.lines if cause else []
    return Result(
        task.key, task.title, points, task.points, status, cause, lines, trial.output, seconds, events if cause else []
    )


def open_student(lab: Lab, file: Path | dict[str, Any], seconds: float, live: bool = False) -> Any:
    """A process with the student's file, or the engine's own code in its place."""
    if isinstance(file, dict):
        return Local(file)
    surroundings: dict[str, Any] = {"preload": lab.preload, "memory": lab.memory, "environment": lab.environment}
    return Student(file, seconds=seconds, live=live, **surroundings)


def save_recording(events: list[Event], path: Path) -> None:
    """Writes a failing trace's events, for ``minipaged visualize --replay``."""
    recorder = Recorder(path)
    for event in events:
        recorder(event)
    recorder.close()


def report(results: list[Result]) -> str:
    """JSON of the results, for other programs."""
    return json.dumps([result.to_dict() for result in results], indent=2)
