"""The engine on a student's code, for the visualizer: ``minipaged visualize --lab A1``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from minipaged.errors import InvalidRequest
from minipaged.events import EventLog
from minipaged.labs import find
from minipaged.labs.checking import open_student
from minipaged.labs.desk import Desk
from minipaged.labs.lab import Lab
from minipaged.labs.student import Violation

SECONDS = 10.0  # for one call


def settings_of(key: str) -> dict[str, Any]:
    """What the engine's configuration must be for this lab. `InvalidRequest` if it cannot be watched, or has not been
    started in this folder."""
    lab = find(key)
    Desk(lab, Path.cwd()).require()
    checks = _checks(lab)
    if not hasattr(checks, "manager") and not hasattr(checks, "scheduler"):
        raise InvalidRequest(f"lab {lab.key} is no part of the engine's memory or scheduler; there is nothing to watch")
    return getattr(checks, "SETTINGS", {"enable_prefix_caching": False})


def install(llm: Any, key: str) -> None:
    """From its next start on the engine runs on the student's file, in a process of its own: read anew at each start.

    What the file does wrong comes out of `Engine.step` as a `Violation`. Raises `InvalidRequest` if it cannot start.
    """
    engine, lab = llm.engine, find(key)
    try:
        if hasattr(_checks(lab), "manager"):
            engine.make_memory = Part(lab, _checks(lab).manager)
            engine.make_memory(engine.config, EventLog())  # complains now
        else:
            engine.make_scheduler = Part(lab, _checks(lab).scheduler)
            engine.make_scheduler(engine.memory, max_num_seqs=1, max_num_batched_tokens=1)
    except Violation as error:
        raise InvalidRequest(f"{error}; write it first: minipaged lab watch {lab.key}") from error


class Part:
    """Makes a part of an engine on a student's file: a memory manager or a scheduler, as `Engine` wants them."""

    def __init__(self, lab: Lab, make: Callable[..., Any]) -> None:
        self._lab, self._file, self._make = lab, Desk(lab, Path.cwd()).file, make
        self._student: Any = None

    def __call__(self, *args: Any, **settings: Any) -> Any:
        student = open_student(self._lab, self._file, SECONDS, live=True)
        try:
            part = self._make(student, *args, **settings)
        except BaseException:
            student.close()
            raise
        self.close()  # only now: when the new file is no good, the old engine goes on
        self._student = student
        return part

    def close(self) -> None:
        if self._student is not None:
            self._student.close()


def _checks(lab: Lab) -> Any:
    return import_module(f"minipaged.labs.{lab.key.lower()}.checks")
