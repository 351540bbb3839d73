"""Where the engine tells what happens."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

from minipaged.events.types import Event


class EventLog:
    """Where the engine tells what happens. Subscribers are called in order, in the engine's thread.

    They watch: what they want of the engine has to wait until the step is over. One that raises is called no more, and
    a warning says so once the engine is done with what it was doing: its books must not suffer from who reads them.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._failures: list[tuple[Callable[[Event], None], Exception]] = []

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``callback(event)`` for every event from now on. Returns a function that ends it."""
        self._subscribers.append(callback)
        return lambda: self._unsubscribe(callback)

    @property
    def active(self) -> bool:
        """Whether anybody listens. Emitters ask first when making an event costs something."""
        return bool(self._subscribers)

    def emit(self, cls: type[Event], *args: Any) -> None:
        """Makes the event only if somebody listens, so that a silent engine does not pay for it."""
        if self._subscribers:
            event = cls(*args)
            for subscriber in tuple(self._subscribers):  # one may unsubscribe
                try:
                    subscriber(event)
                except Exception as error:
                    self._unsubscribe(subscriber)
                    self._failures.append((subscriber, error))

    def warn_of_failures(self) -> None:
        """Tells of subscribers that raised since the last time. To be called when nothing is half done."""
        while self._failures:
            subscriber, error = self._failures.pop(0)
            trace = "".join(traceback.format_exception(error))
            message = f"a subscriber of events raised and is called no more: {subscriber!r}\n{trace}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _unsubscribe(self, callback: Callable[[Event], None]) -> None:
        if callback in self._subscribers:
            self._subscribers.remove(callback)
