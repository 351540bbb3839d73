"""The record log between one engine thread and any number of viewers.

A *record* is one step's events (or those of something between two steps) as JSON, encoded once however many
watch. Records are numbered from 0 within a *run*; viewers pull those from their *cursor* on. A *keyframe* is
the reduced state before a record: who comes late starts from one instead of from the beginning.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
from typing import Any

from minipaged.events import EngineStarted, Event, State

KEYFRAME_EVERY = 40  # records
MAX_RECORDS = 60 * KEYFRAME_EVERY  # what is older is forgotten
HISTORY = 400  # records that a late joiner gets to rewind
MAX_SAVED = 32_000_000  # characters of a run that can still be saved
LONG_POLL = 5.0  # seconds until a pull returns with nothing new
FAST, CROWD = 0.05, 4  # seconds between looks, for up to so many viewers
SLOW = 0.1  # seconds for each viewer beyond that: all of them together look ten times a second
HIDDEN = 2.0  # seconds for a page in a tab that nobody looks at


def encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def encode_events(events: list[Event]) -> str:
    """JSON has no NaN and no infinity; a browser refuses a whole answer for one of them."""
    return encode([{key: _finite(value) for key, value in event.to_dict().items()} for event in events])


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RecordLog:
    """The `Sink` that viewers pull from. The engine's thread writes, the server's event loop reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: dict[str, Any] = {}
        self._status_version = 0
        self._pulling = 0  # viewers that wait right now
        self._closed = False
        self._saved: list[str] = []  # all records since the engine's start, to be saved as a recording
        self._saved_size = 0
        self._begin(State())

    def _begin(self, state: State) -> None:
        """A new run: viewers notice the new id and start over."""
        self.run = secrets.token_hex(4)
        self.state = state
        self._records: list[str] = []
        self._first = 0  # number of the oldest record kept
        self._keyframes = {0: encode(state.to_dict())}

    # --- the engine's side ----------------------------------------------------------------------------------

    def started(self, event: EngineStarted) -> None:
        state = State()
        state.apply(event)
        with self._lock:
            self._begin(state)
            self._saved = [encode_events([event])]
            self._saved_size = 0

    def publish(self, events: list[Event]) -> None:
        with self._lock:
            for event in events:
                self.state.apply(event)
            self._records.append(encode_events(events))
            self._keep(self._records[-1])
            if self.end % KEYFRAME_EVERY == 0:
                self._keyframes[self.end] = encode(self.state.to_dict())
            if len(self._records) > MAX_RECORDS:
                self._forget_oldest()

    def _keep(self, record: str) -> None:
        """The same strings as the records', so this costs only what those forget. Without an end it would grow."""
        self._saved_size += len(record)
        if self._saved_size > MAX_SAVED:
            self._saved.clear()
        elif self._saved:
            self._saved.append(record)

    def saved(self) -> list[str]:
        """All records of the engine's run from its start on; empty if it has grown too long to keep."""
        with self._lock:
            return list(self._saved)

    def status(self, status: dict[str, Any]) -> None:
        with self._lock:
            if status != self._status:
                self._status = status
                self._status_version += 1

    def close(self) -> None:
        """Lets nobody wait any longer: a server cannot stop while it owes answers."""
        self._closed = True

    @property
    def end(self) -> int:
        """The number that the next record will have."""
        return self._first + len(self._records)

    def _forget_oldest(self) -> None:
        del self._records[:KEYFRAME_EVERY]
        del self._keyframes[self._first]
        self._first += KEYFRAME_EVERY

    # --- the viewers' side ----------------------------------------------------------------------------------

    async def pull(self, request: Any) -> str:
        """Answers ``{"run", "cursor", "status"}`` with what is new since then, as soon as there is something.

        Whatever the request lacks or gets wrong makes its sender a late joiner, who is answered at once.
        """
        asked = request if isinstance(request, dict) else {}
        self._pulling += 1
        try:
            deadline = time.monotonic() + LONG_POLL
            while True:
                if asked.get("run") == self.run:
                    await asyncio.sleep(self._patience(asked.get("idle") is True))
                answer = self.news(asked.get("run"), asked.get("cursor"), asked.get("status"))
                if answer is not None or self._closed or time.monotonic() > deadline:
                    return answer or "{}"
        finally:
            self._pulling -= 1

    def _patience(self, hidden: bool) -> float:
        """Seconds until the next look. Each costs the engine's thread some time, so a crowd shares a number of them."""
        patience = FAST if self._pulling <= CROWD else SLOW * self._pulling
        return max(patience, HIDDEN) if hidden else patience

    def news(self, run: Any, cursor: Any, status: Any) -> str | None:
        """The answer to a pull as JSON, or ``None`` when there is nothing to tell."""
        with self._lock:
            keyframe = "null"
            known = run == self.run and type(cursor) is int and self._first <= cursor <= self.end
            if not known:
                cursor = self._late_start()
                keyframe = self._keyframes[cursor]
            elif cursor == self.end and status == self._status_version:
                return None
            records = ",".join(self._records[cursor - self._first :])
            head = {
                "run": self.run,
                "first": cursor,
                "status": self._status,
                "status_version": self._status_version,
            }
        return f'{encode(head)[:-1]},"keyframe":{keyframe},"records":[{records}]}}'

    def _late_start(self) -> int:
        """The newest keyframe that leaves some history to rewind."""
        early = [number for number in self._keyframes if number <= self.end - HISTORY]
        return max(early, default=self._first)
