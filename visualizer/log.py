"""The record log between one engine thread and any number of viewers.

A *record* holds the events of one step (or those between two steps) as JSON, encoded once for all viewers. Records
are numbered from 0 within a *run*; a viewer pulls the records from its *cursor* on. A *keyframe* is the state before a
record: a viewer that joins late starts from a keyframe instead of record 0.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
from typing import Any

import psutil

from minipaged.events import EngineStarted, Event, State

KEYFRAME_EVERY = 40  # records
MAX_RECORDS = 60 * KEYFRAME_EVERY  # older records are dropped
HISTORY = 400  # records that a late viewer receives, to rewind
MAX_SAVED = 32_000_000  # characters of a run that can still be saved
LONG_POLL = 5.0  # seconds until a pull returns with nothing new
FAST, CROWD = 0.05, 4  # seconds between checks of one viewer; the number of viewers up to which that holds
SLOW = 0.1  # with more: seconds times the number of viewers, so that all together check ten times a second
HIDDEN = 2.0  # seconds between checks for a page in a hidden tab


def encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def encode_events(events: list[Event]) -> str:
    """Events as JSON, with null for NaN and infinity: a browser rejects a whole answer that contains either."""
    return encode([{key: _finite(value) for key, value in event.to_dict().items()} for event in events])


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RecordLog:
    """The `Sink` that stores records for the viewers. The engine's thread writes, the server's event loop reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = psutil.Process()
        self._status: dict[str, Any] = {}
        self._status_version = 0
        self._pulling = 0  # viewers that are waiting for an answer
        self._closed = False
        self._saved: list[str] = []  # all records since the engine's start, for saving as a recording
        self._saved_size = 0
        self._begin(State())

    def _begin(self, state: State) -> None:
        """Starts a new run with a new id, so that viewers start over."""
        self.run = secrets.token_hex(4)
        self.state = state
        self._records: list[str] = []
        self._rss: list[int] = []  # the process' resident memory after each record, in MiB
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
            self._rss.append(self._process.memory_info().rss >> 20)
            self._keep(self._records[-1])
            if self.end % KEYFRAME_EVERY == 0:
                self._keyframes[self.end] = encode(self.state.to_dict())
            if len(self._records) > MAX_RECORDS:
                self._forget_oldest()

    def _keep(self, record: str) -> None:
        """Keeps a record for saving, up to MAX_SAVED. The string is shared with ``_records`` while that keeps it."""
        self._saved_size += len(record)
        if self._saved_size > MAX_SAVED:
            self._saved.clear()
        elif self._saved:
            self._saved.append(record)

    def saved(self) -> list[str]:
        """All records since the engine's start; empty if the run is longer than MAX_SAVED."""
        with self._lock:
            return list(self._saved)

    def status(self, status: dict[str, Any]) -> None:
        with self._lock:
            if status != self._status:
                self._status = status
                self._status_version += 1

    def close(self) -> None:
        """Ends all pulls that are waiting: a server cannot stop while requests are pending."""
        self._closed = True

    @property
    def end(self) -> int:
        """The number of the next record."""
        return self._first + len(self._records)

    def _forget_oldest(self) -> None:
        del self._records[:KEYFRAME_EVERY]
        del self._rss[:KEYFRAME_EVERY]
        del self._keyframes[self._first]
        self._first += KEYFRAME_EVERY

    # --- the viewers' side ----------------------------------------------------------------------------------

    async def pull(self, request: Any) -> str:
        """Long poll: waits for news since the request's ``{"run", "cursor", "status"}`` and returns them as JSON.

        A request with missing or invalid fields is answered immediately, like that of a viewer who joins late.
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
        """Seconds until the next check. Each check delays the engine's thread, so many viewers check less often."""
        patience = FAST if self._pulling <= CROWD else SLOW * self._pulling
        return max(patience, HIDDEN) if hidden else patience

    def news(self, run: Any, cursor: Any, status: Any) -> str | None:
        """The answer to a pull as JSON, or ``None`` if nothing has changed."""
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
                "rss": self._rss[cursor - self._first :],
            }
        return f'{encode(head)[:-1]},"keyframe":{keyframe},"records":[{records}]}}'

    def _late_start(self) -> int:
        """The number of the newest keyframe with at least HISTORY records after it, else of the oldest keyframe."""
        early = [number for number in self._keyframes if number <= self.end - HISTORY]
        return max(early, default=self._first)
