"""The engine on a student's code, for the visualizer: ``minipaged visualize --lab A1``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from minipaged.config import EngineConfig
from minipaged.errors import InvalidRequest
from minipaged.events import EventLog
from minipaged.labs import find
from minipaged.labs.checking import open_student
from minipaged.labs.desk import Desk
from minipaged.labs.lab import Lab

SECONDS = 10.0  # for one call


def settings_of(key: str) -> dict[str, Any]:
    """What the engine's configuration must be for this lab. `InvalidRequest` if it cannot be watched, or has not been
    started in this folder."""
    lab = find(key)
    Desk(lab, Path.cwd()).require()
    checks = import_module(f"minipaged.labs.{lab.key.lower()}.checks")
    if not hasattr(checks, "manager"):
        raise InvalidRequest(f"lab {lab.key} is no part of the engine's memory; it has nothing to watch")
    return getattr(checks, "SETTINGS", {"enable_prefix_caching": False})


def install(llm: Any, key: str) -> None:
    """From its next start on the engine runs on the student's file, in a process of its own: read anew at each start.

    What the file does wrong comes out of `Engine.step` as a `Violation`.
    """
    make_memory = LabMemory(find(key))
    make_memory(llm.engine.config, EventLog())  # complains now
    llm.engine.make_memory = make_memory


class LabMemory:
    """Makes memory managers on a student's file, as `Engine` wants them."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._file = lab, Desk(lab, Path.cwd()).file
        self._manager = import_module(f"minipaged.labs.{lab.key.lower()}.checks").manager
        self._student: Any = None

    def __call__(self, config: EngineConfig, events: EventLog) -> Any:
        student = open_student(self._lab, self._file, SECONDS, live=True)
        try:
            memory = self._manager(student, config, events)
        except BaseException:
            student.close()
            raise
        self.close()  # only now: when the new file is no good, the old engine goes on
        self._student = student
        return memory

    def close(self) -> None:
        if self._student is not None:
            self._student.close()
