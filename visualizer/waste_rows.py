"""What other memory managers would hold for the same texts, record by record, for all viewers together.

The books are kept by `minipaged.memory.waste.Accounts`. They are opened when the first viewer asks and brought up to
date at most twice a second, however many ask; the engine's thread has nothing to do with it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from minipaged.memory.waste import MANAGERS, Accounts, Row
from visualizer.log import RecordLog, encode

EVERY = 0.5  # seconds
PAGE_TOKENS = 64  # of vAttention's page-groups


class WasteRows:
    """Answers the page's requests for rows. A row's number is its record's: what is held after that record."""

    def __init__(self, log: RecordLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._due = 0.0
        self._run: str | None = None
        self._accounts = Accounts()
        self._revision = 0  # counts the times that rows were new or changed
        self._rows: dict[int, tuple[int, str]] = {}  # number -> revision it is from, row as JSON
        self._answers: dict[tuple[int, int], str] = {}  # viewers in step with each other get the same text

    async def __call__(self, request: Any) -> str:
        """Answers ``{"run", "revision", "first"}`` with the rows from ``first`` on that are newer than that."""
        if self._clock() >= self._due:
            await asyncio.to_thread(self.catch_up)  # a first viewer may have minutes to catch up with
        return self.answer(request)

    def catch_up(self) -> None:
        """Brings the books up to date, unless that was done a moment ago."""
        with self._lock:
            if self._clock() < self._due:
                return
            self._due = self._clock() + EVERY
            run, first, state, records = self._log.events_since(self._run, self._accounts.next)
            if state is not None:
                self._run = run
                self._accounts = Accounts(state, first, PAGE_TOKENS)
                self._rows.clear()
            for events in records:
                for event in events:
                    self._accounts.apply(event)
                self._accounts.close()
            self._publish(self._accounts.update())

    def _publish(self, changed: list[int]) -> None:
        self._accounts.forget(self._log.first)
        for number in [number for number in self._rows if number < self._log.first]:
            del self._rows[number]
        self._answers.clear()
        self._revision += bool(changed)
        for number in changed:
            if number in self._accounts.rows:
                self._rows[number] = (self._revision, encode(flat(number, self._accounts.rows[number])))

    def answer(self, request: Any) -> str:
        """As JSON. Whatever the request lacks or gets wrong makes its sender a newcomer, who gets all rows."""
        asked = request if isinstance(request, dict) else {}
        revision, first = asked.get("revision"), asked.get("first")
        with self._lock:
            if asked.get("run") != self._run or type(revision) is not int:
                revision = -1
            if type(first) is not int:
                first = 0
            key = (min(revision, self._revision), first)
            if key not in self._answers:
                self._answers[key] = self._encode(*key)
            return self._answers[key]

    def _encode(self, revision: int, first: int) -> str:
        rows = ",".join(row for number, (since, row) in self._rows.items() if since > revision and number >= first)
        head = {"run": self._run, "revision": self._revision, "managers": MANAGERS, "page_tokens": PAGE_TOKENS}
        return f'{encode(head)[:-1]},"rows":[{rows}]}}'


def flat(number: int, row: Row) -> list[Any]:
    """``[number, step, running, [token, reserved, internal, external, fit] for each manager]``."""
    return [number, row.step, row.running, *(n for name in MANAGERS for n in (*row.held[name], row.fit[name]))]
