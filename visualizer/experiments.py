"""Runs the paper experiments that the page offers: one at a time, in a separate process that every viewer can follow.

The process runs this module at low priority, so that the live engine keeps running. It reports progress on its
standard output, one JSON object per line, and a thread here reads them. The server's own process measures nothing.
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

from minipaged.errors import MinipagedError
from minipaged.experiments import Result, catalogue, run
from minipaged.experiments.result import SECONDARY
from minipaged.experiments.result_text import machine_text, number_text, paper_text
from minipaged.shipped import RESULTS, folder

EARLIER = folder(RESULTS) or Path(RESULTS)
WORKER = (sys.executable, "-P", "-m", "visualizer.experiments")
LOOKING = ("experiments", "experiment")  # read-only commands, allowed for every viewer

log = logging.getLogger(__name__)


class BadRequest(MinipagedError, ValueError):
    """A command that is invalid, or not possible at the moment; the message says why."""


@dataclass
class _Run:
    """The state of an experiment that is running or has ended: its process, progress and error."""

    name: str
    quick: bool
    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0
    text: str = "starting"
    cancelled: bool = False
    error: str = ""


class Experiments:
    """Handles the page's commands whose names begin with "experiment".

    ``earlier`` is a folder of earlier results, possibly from another machine. ``worker`` is the command line of the
    measuring process; the experiment's name is appended to it.
    """

    def __init__(self, earlier: Path = EARLIER, worker: Seq[str] = WORKER) -> None:
        self._worker = tuple(worker)
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._ended: _Run | None = None  # the last one that ended without a result
        self._count = 0  # number of results measured here
        self._measured: dict[str, tuple[int, Result]] = {}  # name -> the value of _count at that time, the result
        self._earlier = _read(earlier)

    def __call__(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Like `Commands`: ``{"ok": True, "result": …}``, or ``{"ok": False, "message": …}`` for the user."""
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

    # --- reading ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The running experiment, the last one that failed or was cancelled, and the names that have results."""
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
        """The experiment's results for the page: the one measured here and the earlier one, as far as they exist."""
        with self._lock:
            here = [self._measured[name][1]] if name in self._measured else []
        before = [self._earlier[name]] if name in self._earlier else []
        return [_view(result, True) for result in here] + [_view(result, False) for result in before]

    # --- running ----------------------------------------------------------------------------------------------

    def start(self, name: str, quick: bool) -> None:
        """Starts the experiment in a new process. Raises `BadRequest` while another one runs."""
        with self._lock:
            if self._run:
                raise BadRequest(f"“{self._run.name}” is being measured; one at a time, for the sake of both.")
            command = [*self._worker, name, *(["--quick"] if quick else [])]
            try:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
                    # The new process must import the same modules as this one, wherever they are installed.
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )  # fmt: skip
            except OSError as error:
                raise BadRequest(f"The experiment's process cannot be started: {error}.") from None
            self._run, self._ended = _Run(name, quick, process), None
            threading.Thread(target=self._follow, args=(self._run,), name="minipaged-experiment", daemon=True).start()

    def cancel(self) -> None:
        """Kills the process of the running experiment, if there is one. It may take a moment to exit."""
        with self._lock:
            if self._run:
                self._run.cancelled = True
                self._run.process.kill()  # it holds no resources that need a clean shutdown

    def close(self) -> None:
        """Stops the running experiment, so that it does not outlive the server."""
        self.cancel()

    def _follow(self, run: _Run) -> None:
        """Reads the process's output until it exits, and stores progress and result. Runs in a thread of its own."""
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
                except (ValueError, TypeError, KeyError):  # an incomplete line: the process was killed
                    log.warning("unreadable output of an experiment's process, ignored: %.200r", line)
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
    """The catalogue of experiments for the page, as JSON-compatible objects."""
    return [entry._asdict() for entry in catalogue()]


def _name(payload: dict[str, Any]) -> str:
    name = payload.get("name")
    if not isinstance(name, str) or name not in {entry.name for entry in catalogue()}:
        raise BadRequest(f"There is no experiment {str(name)[:40]!r}.")
    return name


def _read(folder: Path) -> dict[str, Result]:
    """The results in a folder, by experiment name. Skips unreadable files, since earlier results are optional."""
    results = {}
    for entry in catalogue():
        path = folder / f"{entry.name}.json"
        if path.exists():
            try:
                results[entry.name] = Result.from_json(path.read_text(encoding="utf-8"))
                _view(results[entry.name], False)
            except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
                results.pop(entry.name, None)
                log.warning("%s is not an experiment's result, ignored: %r", path, error)
    return results


def _view(result: Result, here: bool) -> dict[str, Any]:
    """A result as JSON-compatible text and numbers for the page."""
    rows = [
        # paper_text escapes the star of a secondary source for Markdown; the page needs it unescaped.
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


# --- the measuring process --------------------------------------------------------------------------------------


def _measure(name: str, quick: bool, tell: Callable[..., None]) -> None:
    try:
        result = run(name, quick, lambda done, text: tell(done=done, text=text))
    except BrokenPipeError:
        return  # the server has exited
    except Exception as error:
        log.exception("experiment %s", name)
        tell(error=f"{type(error).__name__}: {error}")
    else:
        tell(result=json.loads(result.to_json()))


def main(arguments: list[str]) -> None:
    """Entry point of the measuring process. Arguments: ``NAME [--quick]``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this process
    if hasattr(os, "nice"):
        os.nice(10)
    # An experiment's own prints go to stderr, so that they do not mix with the lines that the server reads.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=lines, flush=True)

    _measure(arguments[0], "--quick" in arguments[1:], tell)


if __name__ == "__main__":
    main(sys.argv[1:])
