"""The engine in a thread of its own: it takes commands from a queue and tells a listener what comes out.

An engine is not thread-safe, and its callers come and go. So only this thread touches the engine: a caller hands in
a function and gets a `Future`. The server runs `EngineLoop` as it is. The visualizer's `PacedLoop` overrides
``_patience``, ``_step``, ``_settle``, ``_recover`` and ``_adopt``; the loop itself, ``_run``, is the same.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from minipaged.build import rebuild
from minipaged.core.engine import Engine
from minipaged.errors import StepFailed
from minipaged.outputs import RequestOutput

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who waits for outputs. Called in the engine's thread; must not block."""

    def delivered(self, outputs: list[RequestOutput], why: str | None = None) -> None:
        """What a step returned. ``why`` says what ended those whose sequences were aborted."""

    def lost(self, why: str) -> None:
        """Nothing that was asked for so far will be answered."""


class EngineLoop:
    """Steps ``llm.engine`` as long as there is work, and obeys commands in between.

    Methods without underscore may be called from any thread.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine: Engine = llm.engine
        self._listener: Listener | None = None
        self._stopping = False
        self._commands: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="minipaged-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the command or step it is at."""

        def stop() -> None:
            self._stopping = True

        self.call(stop)
        self._thread.join(timeout=10)

    def listen(self, listener: Listener | None) -> None:
        """Tells ``listener`` what the engine puts out from the next step on. There is one at most."""
        self._listener = listener

    def call(self, command: Callable[[], Any]) -> Future[Any]:
        """Runs ``command()`` in the engine's thread, between two steps. What it raises, the future raises."""
        future: Future[Any] = Future()
        self._commands.put((command, future))
        return future

    def abort(self, request_id: str) -> Future[None]:
        """Ends a request in whatever state it is, if there is such a request."""

        def abort() -> None:
            output = self.engine.abort(request_id)
            if output is not None:
                self._tell([output], "the request was aborted")

        return self.call(abort)

    # --- the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                command, future = self._commands.get(timeout=self._patience())
            except queue.Empty:
                self._advance()
            else:
                self._obey(command, future)

    def _patience(self) -> float | None:
        """How long to wait for a command before the next step is due; ``None``: no step is."""
        return 0.0 if self.engine.has_unfinished() else None

    def _obey(self, command: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # whoever asked has given up waiting
        try:
            try:
                result = command()
            finally:  # before the result, so that its receiver finds the state it led to
                self._settle()
        except Exception as error:  # the caller's business; the engine goes on for the others
            future.set_exception(error)
        else:
            future.set_result(result)

    def _advance(self) -> None:
        """One step. Never raises."""
        try:
            self._step()
        except StepFailed as error:
            log.error("%s", error)  # the engine goes on with the others
        except Exception as error:
            log.exception("the engine's step raised")
            self._recover(error)
        self._settle()

    def _step(self) -> None:
        """One step, and its outputs told. Raises what the step raised."""
        try:
            outputs = self.engine.step()
        except StepFailed as error:
            self._tell(error.outputs, "a step of the engine failed")
            raise
        self._tell(outputs)

    def _settle(self) -> None:
        """Runs after each step and each command. A subclass tells here what they changed."""

    def _recover(self, error: Exception) -> None:
        """A step raised because of a bug, and the bookkeeping may be wrong: starts over."""
        log.error("the engine starts over")
        self._adopt(rebuild(self.engine))

    def _tell(self, outputs: list[RequestOutput], why: str | None = None) -> None:
        if self._listener is not None and outputs:
            self._listener.delivered(outputs, why)

    def _adopt(self, engine: Engine) -> None:
        """Makes ``engine`` the one to run. Who waits for the old one waits in vain, and is told."""
        self.engine = self.llm.engine = engine
        if self._listener is not None:
            self._listener.lost("the engine was started over")
