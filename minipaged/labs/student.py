"""The grader's side of a student's process: `Student` starts it, asks it, and ends it.

What goes wrong there becomes a `Violation`, one sentence of cause, or a `StudentError`, an exception that the
student's code raised (which may be just what was asked for).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from minipaged.errors import BlockError, InvalidRequest, MinipagedError, OutOfBlocks
from minipaged.labs import worker
from minipaged.labs.worker import HEADER, ProtocolError, pack, sizes, unpack

PATIENCE = 8  # times a limit, for a process that waits: for the processor, or for nothing
MAX_OUTPUT = 1 << 20  # bytes that a student's file may print in one process
SHOWN_OUTPUT = 4000  # characters of it that reports repeat
PACKAGE = Path(__file__).parent.parent


class Violation(MinipagedError, AssertionError):
    """The student's code broke a rule. ``rule`` names it briefly, so that a shorter trace can be told to show the same.

    The text says in one sentence what went wrong, with the call that did it.
    """

    def __init__(self, cause: str, rule: str = "") -> None:
        super().__init__(cause)
        self.rule = rule or cause


class NotImportable(Violation):
    """The file raises when it is imported, or lacks what was to be written."""


class LimitReached(Violation):
    """It took too long, or too much memory."""


class StudentError(Exception):
    """The student's code raised. ``classes`` are the names of the exception's class and its bases."""

    def __init__(self, told: dict[str, Any], call: str) -> None:
        self.type, self.classes = str(told.get("type")), [str(name) for name in told.get("classes", [])]
        self.message, self.where, self.call = str(told.get("message")), str(told.get("where")), call
        super().__init__(f"{call} raised {self.type}{f': {self.message}' if self.message else ''}")

    def violation(self) -> Violation:
        """This error as a failure: nobody asked for it."""
        place = f" ({self.where})" if self.where else ""
        if "NotImplementedError" in self.classes:
            return Violation(f"{self.call} is not written yet{place}", "not written")
        if self.type == "MemoryError":
            return LimitReached(f"{self.call} ran out of memory{place}")
        return Violation(f"{self}{place}", f"{self.call.partition('(')[0]} raised {self.type}")


class Remote(NamedTuple):
    """An object of the grader's that the student's code may use: these methods and attributes, nothing else.

    ``BlockError``, ``OutOfBlocks`` and ``LookupError`` that its methods raise, the student sees under the same names;
    a `Violation` ends the student's process.
    """

    name: str
    thing: Any
    methods: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


class Object(NamedTuple):
    """An object in the student's process."""

    student: Any
    number: int
    cls: str

    def call(self, method: str, *args: Any) -> Any:
        return self.student.request("call", method, args, self.number)

    def get(self, attribute: str) -> Any:
        return self.student.request("get", attribute, (), self.number)


class Student:
    """A student's file, running in a process of its own, with time and memory limits. Use it as a context manager.

    Inputs and results are plain data, tensors and, as arguments, `Remote` and `Object`. Every method raises
    `StudentError`, `LimitReached` or another `Violation`; after the last two the process is gone. ``seconds`` are for
    everything together, or for each call if ``live``. On a machine that is busy with others it gets more time, up to
    `PATIENCE` times as much: an answer must not be wrong because of the neighbours.
    """

    def __init__(
        self,
        file: Path,
        *,
        preload: tuple[str, ...] = (),
        seconds: float = 10.0,
        memory: int = 1 << 30,
        environment: dict[str, str] | None = None,
        live: bool = False,
    ) -> None:
        if not hasattr(os, "killpg"):
            raise InvalidRequest("labs run students' code in limited processes, which needs Linux or macOS (or WSL)")
        self.file, self.seconds = file, seconds
        self.alive, self._live, self._tensors = True, live, "torch" in preload
        self._remotes: dict[str, Remote] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="minipaged-lab-")
        copy = Path(self._folder.name, file.name)
        copy.write_bytes(file.read_bytes())
        self._output = tempfile.TemporaryFile()
        self._buffer = bytearray()
        there, self._requests = os.pipe()
        self._answers, back = os.pipe()
        settings = {
            "file": str(copy),
            "requests": there,
            "answers": back,
            "paths": [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))] if preload else [],
            "preload": list(preload),
            "forbidden": _forbidden(),
            "limits": {
                **({} if live else {"RLIMIT_CPU": int(seconds) + 2}),
                "RLIMIT_FSIZE": MAX_OUTPUT,
                "RLIMIT_AS": memory,
                "RLIMIT_NPROC": 0,  # no processes, no threads; root it does not bind, but `worker.seal`
                "RLIMIT_CORE": 0,
            },
        }
        environment = {"OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", "HOME": self._folder.name} | (environment or {})
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-u", worker.__file__, json.dumps(settings)],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, cwd=self._folder.name,
            env=environment, pass_fds=(there, back), start_new_session=True,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        self._process_times = psutil.Process(self._process.pid)
        self._begin_time()
        try:
            self._answer("importing your file")
        except StudentError as error:
            self.close()
            place = f" ({error.where})" if error.where else ""
            raise NotImportable(f"your file cannot be imported: {error.type}: {error.message}{place}") from None
        except Violation:
            self.close()
            raise

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new(self, cls: str, *args: Any) -> Object:
        """An instance of a class of the student's."""
        return Object(self, self.request("new", cls, args), cls)

    def function(self, name: str, *args: Any) -> Any:
        return self.request("function", name, args)

    def request(self, do: str, name: str, args: tuple[Any, ...], number: int | None = None) -> Any:
        call = name if do == "get" else f"{name}({', '.join(map(_short, args))})"
        if self._live:
            self._begin_time()
        message = {"do": do, "name": name, "args": [self._handed_over(arg) for arg in args], "object": number}
        self._send(pack(message), call)
        return self._answer(call)

    def output(self) -> str:
        """What the file has printed, cut to what a report can show."""
        if self._output.closed:
            return self._printed
        self._output.flush()
        size = os.fstat(self._output.fileno()).st_size
        text = os.pread(self._output.fileno(), SHOWN_OUTPUT, 0).decode(errors="replace")
        return text + (f"\n… and {size - SHOWN_OUTPUT} bytes more" if size > SHOWN_OUTPUT else "")

    def close(self) -> None:
        """Ends the process with all that it may have started."""
        if not self.alive:
            return
        self.alive = False
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # the latter is how macOS says that it is a zombie
            pass
        self._process.wait()
        self._printed = self.output()
        os.close(self._requests)
        os.close(self._answers)
        self._output.close()
        self._folder.cleanup()

    # --- the conversation ---

    def _handed_over(self, arg: Any) -> Any:
        if isinstance(arg, Remote):
            self._remotes[arg.name] = arg
            return {"$remote": arg.name, "methods": list(arg.methods), "attributes": list(arg.attributes)}
        if isinstance(arg, Object):
            return {"$object": arg.number}
        return arg

    def _answer(self, call: str) -> Any:
        """Reads answers until it is not a callback. In the end the student's result."""
        while True:
            try:
                answer = unpack(*self._frame(call))
                if not isinstance(answer, dict) or not answer:
                    raise ProtocolError("no answer")
            except ProtocolError as error:
                self.close()
                raise Violation(f"{call}: {error}") from None
            if "callback" in answer:
                self._send(pack(self._called_back(answer["callback"])), call)
            elif isinstance(told := answer.get("error"), dict) and isinstance(told.get("classes"), list):
                if told.get("ours"):
                    raise Violation(f"{call}: {told.get('message')}")
                raise StudentError(told, call)
            elif "ok" not in answer:
                self.close()
                raise Violation(f"{call}: no answer")
            else:
                return answer["ok"]

    def _called_back(self, callback: Any) -> dict[str, Any]:
        try:
            name, attribute, args = callback
            remote = self._remotes[name]
            if attribute not in (remote.attributes if args is None else remote.methods):
                raise LookupError(f"the {name} has no {attribute}")
            thing = getattr(remote.thing, attribute)
            return {"ok": thing if args is None else thing(*args)}
        except (BlockError, OutOfBlocks, LookupError, TypeError, ValueError) as error:
            return {"error": [type(error).__name__, str(error)]}
        except Violation:
            self.close()
            raise

    def _send(self, frame: bytes, call: str) -> None:
        if not self.alive:
            raise Violation(f"{call}: your process had ended before", "process ended")
        try:
            view = memoryview(frame)
            while view:
                # A pipe that can take anything takes so much without blocking.
                self._wait([], [self._requests], call)
                view = view[os.write(self._requests, view[: select.PIPE_BUF]) :]
        except BrokenPipeError:
            raise self._ended(call) from None

    def _frame(self, call: str) -> tuple[bytes, bytes]:
        text_size, raw_size = sizes(self._exactly(HEADER.size, call))
        text, raw = self._exactly(text_size, call), self._exactly(raw_size, call)
        if b'"$tensor"' in text and not self._tensors:
            raise ProtocolError("a tensor cannot be handed over in this lab")
        return text, raw

    def _exactly(self, size: int, call: str) -> bytes:
        while len(self._buffer) < size:
            self._wait([self._answers], [], call)
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise self._ended(call)
            self._buffer += part
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _wait(self, reading: list[int], writing: list[int], call: str) -> None:
        while (left := self._deadline - time.monotonic()) <= 0 or not any(select.select(reading, writing, [], left)):
            if left <= 0 and not self._extended():
                self.close()
                what = "it" if self._live else "this task"
                raise LimitReached(f"{call} was not done when the {self.seconds:.3g} seconds for {what} were over")

    def _begin_time(self) -> None:
        now = time.monotonic()
        self._deadline, self._last_deadline = now + self.seconds, now + PATIENCE * self.seconds
        self._used_before = self._used()

    def _extended(self) -> bool:
        """Sets another deadline if the process has not had its seconds of the processor yet."""
        left = self.seconds - (self._used() - self._used_before)
        now = time.monotonic()
        if left < self.seconds / 10 or now >= self._last_deadline:
            return False
        self._deadline = min(now + left, self._last_deadline)
        return True

    def _used(self) -> float:
        """Seconds of the processor that it has had."""
        try:
            times = self._process_times.cpu_times()
        except psutil.Error:  # it has ended; reading its answer will tell
            return 0.0
        return times.user + times.system

    def _ended(self, call: str) -> Violation:
        """What became of a process that answers no more. It may have closed the pipe, and go on."""
        try:
            code = self._process.wait(max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self.close()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return LimitReached(f"{call} used up the time for this task")
        how = f"with signal {-code}" if code < 0 else f"with exit code {code}"
        return Violation(f"{call} ended its process ({how}) instead of returning", "process ended")


class Local:
    """Objects of this very process in a student's place: the engine's own code, checked like a student's."""

    alive = True

    def __init__(self, names: dict[str, Any]) -> None:
        self._names, self._objects = names, list[Any]()

    def new(self, cls: str, *args: Any) -> Object:
        return Object(self, self.request("new", cls, args), cls)

    def function(self, name: str, *args: Any) -> Any:
        return self.request("function", name, args)

    def request(self, do: str, name: str, args: tuple[Any, ...], number: int | None = None) -> Any:
        call = f"{name}({', '.join(map(_short, args))})"
        given = [arg.thing if isinstance(arg, Remote) else arg for arg in args]
        given = [self._objects[arg.number] if isinstance(arg, Object) else arg for arg in given]
        try:
            if do == "new":
                self._objects.append(self._names[name](*given))
                return len(self._objects) - 1
            if do == "function":
                return _as_sent(self._names[name](*given))
            thing = getattr(self._objects[number or 0], name)
            return _as_sent(thing(*given) if do == "call" else thing)
        except Exception as error:
            classes = [cls.__name__ for cls in type(error).__mro__]
            told = {"type": classes[0], "classes": classes, "message": str(error), "where": ""}
            raise StudentError(told, call) from error

    def output(self) -> str:
        return ""

    def close(self) -> None:
        pass


def expect(action: Callable[[], Any], error: str, call: str, why: str) -> None:
    """``action()`` must raise the student's ``error`` (or a subclass). ``why`` ends the sentence if it does not."""
    try:
        result = action()
    except StudentError as raised:
        if error in raised.classes:
            return
        raise raised.violation() from None
    rule = f"{call.partition('(')[0]} must raise"
    raise Violation(f"{call} returned {result!r} instead of raising {error}: {why}", rule)


def _as_sent(value: Any) -> Any:
    """As it would come over the pipe."""
    if isinstance(value, (list, tuple)):
        return [_as_sent(item) for item in value]
    return {key: _as_sent(item) for key, item in value.items()} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    if isinstance(value, Remote):
        return value.name
    text = f"<{value.cls}>" if isinstance(value, Object) else repr(value)
    if hasattr(value, "shape"):
        text = f"tensor{tuple(value.shape)}"
    return text if len(text) <= 60 else text[:57] + "…"


def _forbidden() -> list[str]:
    """Folders whose files the student's code may not read: the engine's source. With it, in a checkout, its tests."""
    root = PACKAGE.parent
    names = ("minipaged", "visualizer", *(("tests", "tutorials") if (root / "pyproject.toml").is_file() else ()))
    return [str(root / name) for name in names if (root / name).is_dir()]
