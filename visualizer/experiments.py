"""Experiments from the page: one at a time, in a process of its own, which any viewer can follow.

The process runs this very module, at a low priority: the live engine goes on. It tells what it does on its standard
output, one JSON object a line, and a thread here reads them. Nothing is measured in the server's own process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import minipaged
from minipaged.errors import MinipagedError
from minipaged.experiments import Result, catalogue, run
from minipaged.experiments.result import SECONDARY
from minipaged.experiments.result_text import machine_text, number_text, paper_text

EARLIER = Path(minipaged.__file__).resolve().parent.parent / "benchmarks" / "results" / "experiments"
WORKER = (sys.executable, "-P", "-m", "visualizer.experiments")
LOOKING = ("experiments", "experiment")  # commands that start and stop nothing: anybody may

log = logging.getLogger(__name__)


class BadRequest(MinipagedError, ValueError):
    """What was asked for makes no sense, or not now; the message says why."""


@dataclass
class _Run:
    """An experiment that is running, or how it ended."""

    name: str
    quick: bool
    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0
    text: str = "starting"
    cancelled: bool = False
    error: str = ""


class Experiments:
    """Answers the page's commands whose names begin with "experiment".

    ``earlier`` is a folder of results measured before, possibly on another machine. ``worker`` is the command line that
    measures, before the experiment's name.
    """

    def __init__(self, earlier: Path = EARLIER, worker: Seq[str] = WORKER) -> None:
        self._worker = tuple(worker)
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._ended: _Run | None = None  # the last one that ended without a result
        self._count = 0  # of results measured here
        self._measured: dict[str, tuple[int, Result]] = {}  # when in that count, and what
        self._earlier = _read(earlier)

    def __call__(self, payload: dict[str, Any]) -> dict[str, Any]:
        """As `Commands`: ``{"ok": True, "result": …}``, or ``{"ok": False, "message": …}`` with words for the user."""
        try:
            match payload.get("do"):
                case "experiments":
                    return {"ok": True, "result": self.state()}
                case "experiment":
                    return {"ok": True, "result": self.results(_name(payload))}
                case "experiment-run":
                    self.start(_name(payload), payload.get("quick") is True)
                    return {"ok": True, "result": None}
                case "experiment-cancel":
                    self.cancel()
                    return {"ok": True, "result": None}
                case other:
                    raise BadRequest(f"There is no command {str(other)[:40]!r}.")
        except MinipagedError as error:
            return {"ok": False, "message": str(error)}

    # --- looking on -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What is running, how the last one failed, and which experiments have results."""
        with self._lock:
            run, ended = self._run, self._ended
            names = self._earlier.keys() | self._measured.keys()
            return {
                "running": run and {
                    "name": run.name, "quick": run.quick, "done": run.done, "text": run.text,
                    "seconds": round(time.monotonic() - run.started),
                },
                "ended": ended and {"name": ended.name, "message": ended.error, "cancelled": ended.cancelled},
                "results": {name: self._measured[name][0] if name in self._measured else 0 for name in names},
            }  # fmt: skip

    def results(self, name: str) -> list[dict[str, Any]]:
        """The experiment's results as the page shows them: measured here, if it was, and earlier, if it was."""
        with self._lock:
            here = [self._measured[name][1]] if name in self._measured else []
        before = [self._earlier[name]] if name in self._earlier else []
        return [_view(result, True) for result in here] + [_view(result, False) for result in before]

    # --- running ----------------------------------------------------------------------------------------------

    def start(self, name: str, quick: bool) -> None:
        """Starts the experiment. `BadRequest` while another one runs."""
        with self._lock:
            if self._run:
                raise BadRequest(f"“{self._run.name}” is being measured; one at a time, for the sake of both.")
            command = [*self._worker, name, *(["--quick"] if quick else [])]
            try:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
                    # It finds the modules that this process has found, wherever they are from.
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )  # fmt: skip
            except OSError as error:
                raise BadRequest(f"The experiment's process cannot be started: {error}.") from None
            self._run, self._ended = _Run(name, quick, process), None
            threading.Thread(target=self._follow, args=(self._run,), name="minipaged-experiment", daemon=True).start()

    def cancel(self) -> None:
        """Ends the experiment that runs, if one does. It may take the process a moment to be gone."""
        with self._lock:
            if self._run:
                self._run.cancelled = True
                self._run.process.kill()  # it holds nothing that would have to be put in order

    def close(self) -> None:
        """Nothing is measured on when the server is gone."""
        self.cancel()

    def _follow(self, run: _Run) -> None:
        """In a thread: takes down what the process tells until it has ended."""
        result = None
        assert run.process.stdout
        with run.process.stdout as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                    if "result" in message:
                        result = Result.from_json(json.dumps(message["result"]))
                    elif "error" in message:
                        run.error = message["error"]
                    else:
                        run.done, run.text = message["done"], message["text"]
                except (ValueError, TypeError, KeyError):  # half a line of a process that was killed
                    log.warning("an experiment's process said %.200r", line)
        code = run.process.wait()
        with self._lock:
            self._run = None
            if result and not run.cancelled:
                self._count += 1
                self._measured[run.name] = self._count, result
                return
            run.error = run.error or f"Its process ended, with code {code}, before it was done."
            self._ended = run


def menu() -> list[dict[str, Any]]:
    """What the page needs to know of each experiment."""
    return [entry._asdict() for entry in catalogue()]


def _name(payload: dict[str, Any]) -> str:
    name = payload.get("name")
    if not isinstance(name, str) or name not in {entry.name for entry in catalogue()}:
        raise BadRequest(f"There is no experiment {str(name)[:40]!r}.")
    return name


def _read(folder: Path) -> dict[str, Result]:
    """The results in a folder, by name. One that cannot be read is left out: it is an extra."""
    results = {}
    for entry in catalogue():
        path = folder / f"{entry.name}.json"
        if path.exists():
            try:
                results[entry.name] = Result.from_json(path.read_text(encoding="utf-8"))
                _view(results[entry.name], False)
            except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
                results.pop(entry.name, None)
                log.warning("%s is not an experiment's result: %r", path, error)
    return results


def _view(result: Result, here: bool) -> dict[str, Any]:
    """A result in words and numbers that are ready to be shown."""
    rows = [
        # The star is written as Markdown wants it.
        {"what": row.what, "paper": paper_text(row).replace("\\", ""), "ours": number_text(row), "why": row.why}
        for row in result.rows
    ]
    return {
        "here": here,
        "quick": result.quick,
        "seconds": result.seconds,
        "rows": rows,
        "secondary": any(row.paper and row.source == SECONDARY for row in result.rows),
        "figure": result.figure,
        "assumed": result.assumed,
        "machine": machine_text(result),
    }


# --- the process that measures ----------------------------------------------------------------------------------


def _measure(name: str, quick: bool, tell: Callable[..., None]) -> None:
    try:
        result = run(name, quick, lambda done, text: tell(done=done, text=text))
    except BrokenPipeError:
        return  # whoever wanted to know is gone
    except Exception as error:
        log.exception("experiment %s", name)
        tell(error=f"{type(error).__name__}: {error}")
    else:
        tell(result=json.loads(result.to_json()))


def main(arguments: list[str]) -> None:
    """``NAME [--quick]``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this process
    if hasattr(os, "nice"):
        os.nice(10)
    # What an experiment prints must not come between the lines that the server reads.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=lines, flush=True)

    _measure(arguments[0], "--quick" in arguments[1:], tell)


if __name__ == "__main__":
    main(sys.argv[1:])
