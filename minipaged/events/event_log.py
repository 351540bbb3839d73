"""The event log: delivers the engine's events to subscribers."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

from minipaged.events.types import Event


class EventLog:
    """Delivers the engine's events to subscribers, which are called in order, in the engine's thread.

    Subscribers only watch: they must not change the engine during a step. A subscriber that raises is unsubscribed, so
    that it cannot corrupt the engine's bookkeeping; a warning follows once the engine's current operation is complete.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._failures: list[tuple[Callable[[Event], None], Exception]] = []

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``callback(event)`` for every event from now on. Returns a function that unsubscribes it."""
        self._subscribers.append(callback)
        return lambda: self._unsubscribe(callback)

    @property
    def active(self) -> bool:
        """Whether there are subscribers. Emitters check it first when the event's arguments are costly to compute."""
        return bool(self._subscribers)

    def emit(self, cls: type[Event], *args: Any) -> None:
        """Delivers an event. Creates it only if there are subscribers, so that other engines do not pay for it."""
        if self._subscribers:
            event = cls(*args)
            for subscriber in tuple(self._subscribers):  # a copy, because a subscriber may unsubscribe
                try:
                    subscriber(event)
                except Exception as error:
                    self._unsubscribe(subscriber)
                    self._failures.append((subscriber, error))

    def warn_of_failures(self) -> None:
        """Warns of subscribers that raised since the last call. Call it only when no operation is half done."""
        while self._failures:
            subscriber, error = self._failures.pop(0)
            trace = "".join(traceback.format_exception(error))
            message = f"an event subscriber raised an exception and was unsubscribed: {subscriber!r}\n{trace}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _unsubscribe(self, callback: Callable[[Event], None]) -> None:
        if callback in self._subscribers:
            self._subscribers.remove(callback)
