"""Runs the engine in its own thread: it takes commands from a queue and passes outputs to a listener.

An engine is not thread-safe, and its callers run in many threads. So only this thread touches the engine: a caller
passes a function and gets a `Future`. The server runs `EngineLoop` as it is. The visualizer's `PacedLoop` overrides
``_patience``, ``_step``, ``_settle``, ``_recover`` and ``_adopt``; the loop itself, ``_run``, is the same.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from minipaged.build import rebuild
from minipaged.core.engine import Engine
from minipaged.errors import StepFailed, same_process
from minipaged.outputs import RequestOutput

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Receives the engine's outputs. Called in the engine's thread; must not block."""

    def delivered(self, outputs: list[RequestOutput], why: str | None = None) -> None:
        """Receives what a step returned. ``why``: the reason for which some of the requests were aborted."""

    def lost(self, why: str) -> None:
        """Called when all requests so far are lost: none of them will get another output."""


class EngineLoop:
    """Steps ``llm.engine`` as long as there is work, and runs commands between steps.

    Methods without an underscore may be called from any thread of this process, but not from a process forked from it.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine: Engine = llm.engine
        self._listener: Listener | None = None
        self._stopping = False
        self._pid = os.getpid()
        self._commands: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="minipaged-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the current command or step. A forked process has no such thread to end."""
        if os.getpid() != self._pid:
            return

        def stop() -> None:
            self._stopping = True

        self.call(stop)
        self._thread.join(timeout=10)

    def listen(self, listener: Listener | None) -> None:
        """Passes the engine's outputs to ``listener`` from the next step on. It replaces the previous listener."""
        self._listener = listener

    def call(self, command: Callable[[], Any]) -> Future[Any]:
        """Runs ``command()`` in the engine's thread, between two steps. The future returns or raises what it does.

        Raises `UsedAfterFork` in a process forked from this one.
        """
        same_process(self._pid, "engine")
        future: Future[Any] = Future()
        self._commands.put((command, future))
        return future

    def abort(self, request_id: str) -> Future[None]:
        """Aborts a request in any state; does nothing if there is no such request."""

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
        """Seconds to wait for a command before the next step is due; ``None``: no step is due."""
        return 0.0 if self.engine.has_unfinished() else None

    def _obey(self, command: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # the caller has cancelled the future
        try:
            try:
                result = command()
            finally:  # before the result is set, so that its receiver sees the new state
                self._settle()
        except Exception as error:  # passed to the caller; the engine continues for the others
            future.set_exception(error)
        else:
            future.set_result(result)

    def _advance(self) -> None:
        """Runs one step and handles its errors. Never raises."""
        try:
            self._step()
        except StepFailed as error:
            log.error("%s", error)  # the engine continues with the other requests
        except Exception as error:
            log.exception("the engine's step raised")
            self._recover(error)
        self._settle()

    def _step(self) -> None:
        """Runs one step and passes its outputs to the listener. Raises what the step raised."""
        try:
            outputs = self.engine.step()
        except StepFailed as error:
            self._tell(error.outputs, "a step of the engine failed")
            raise
        self._tell(outputs)

    def _settle(self) -> None:
        """Called after each step and each command. A subclass can report here what they changed."""

    def _recover(self, error: Exception) -> None:
        """Starts over with a new engine: a step raised because of a bug, and the bookkeeping may be wrong."""
        log.error("the engine starts over")
        self._adopt(rebuild(self.engine))

    def _tell(self, outputs: list[RequestOutput], why: str | None = None) -> None:
        if self._listener is not None and outputs:
            self._listener.delivered(outputs, why)

    def _adopt(self, engine: Engine) -> None:
        """Replaces the engine that this thread runs, and tells the listener that the old one's requests are lost."""
        self.engine = self.llm.engine = engine
        if self._listener is not None:
            self._listener.lost("the engine was started over")
