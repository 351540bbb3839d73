"""The exceptions that minipaged raises on purpose, so that callers can catch each kind.

The ones that a user can cause (`InvalidRequest`, `InvalidConfig`, `ModelError`, `InvalidTrace`) are also
`ValueError`s: input is checked before any state changes, and the message says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


class MinipagedError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequest(MinipagedError, ValueError):
    """A prompt or a sampling parameter that can never be served as it stands."""


class InvalidConfig(MinipagedError, ValueError):
    """An engine setting that is invalid, alone or in combination with another one."""


class ModelError(MinipagedError, ValueError):
    """A model that cannot be found, read or supported."""


class InvalidTrace(MinipagedError, ValueError):
    """A file that is not a valid trace of requests."""


class PortInUse(MinipagedError, OSError):
    """Another program listens on the port."""


class OutOfBlocks(MinipagedError, MemoryError):
    """The pool has no free block. The scheduler checks before it allocates, so this error means a bug in the caller."""


class BlockError(MinipagedError, RuntimeError):
    """An operation that is invalid for a block's state: freed twice, shared when free, or an unknown block."""


class InvariantViolation(MinipagedError, AssertionError):
    """`check()` found the bookkeeping inconsistent. Always a bug; please report it with the recording."""


class WorkerFailed(MinipagedError, RuntimeError):
    """A worker of a batch over Ray, or Ray itself, died or raised; the answers written so far are kept. Or another
    process of a tensor-parallel group ended too early."""


class RequestFailed(MinipagedError, RuntimeError):
    """A request ended with an error while it ran: no token could be drawn from its logits. The others are not affected.

    ``outputs``: from `LLM.generate` those of all its requests, the failed ones with the ``finish_reason`` "error".
    """

    def __init__(self, message: str, outputs: list[Any] | None = None) -> None:  # of `RequestOutput`, unknown here
        super().__init__(message)
        self.outputs = outputs or []


class StepFailed(RequestFailed):
    """A step raised (out of memory, a kernel error). Its requests were aborted and their blocks freed; the engine
    continues with the others. ``outputs`` holds what the aborted requests had generated."""


class UsedAfterFork(MinipagedError, RuntimeError):
    """An LLM was used in a process that was forked from the one that built it: its threads do not exist there."""


def same_process(pid: int, what: str) -> None:
    """Raises `UsedAfterFork` unless this is process ``pid``, which built ``what``.

    Only the thread that calls ``fork()`` lives on in the child. A lock that another one held stays locked there for
    ever, as does the engine's queue of commands, and OpenMP waits for threads that are gone.
    """
    if os.getpid() != pid:
        raise UsedAfterFork(
            f"this {what} was built in process {pid}, and this is process {os.getpid()}, forked from it without its "
            'threads; build another one here, in a process started with multiprocessing.get_context("spawn")'
        )


def whole_number(value: Any, name: str, least: int, error: type[ValueError]) -> None:
    """Raises ``error`` unless ``value`` is a whole number of at least ``least``."""
    # bool is an Integral in Python; `n=True` is a mistake, not a number.
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise error(f"{name} must be a whole number of at least {least}, not {value!r}")


def real_number(value: Any, name: str, low: float, high: float) -> None:
    """Raises `InvalidRequest` unless ``value`` is a number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise InvalidRequest(f"{name} must be a number between {low:g} and {high:g}, not {value!r}")


def unicode_text(text: str, name: str) -> None:
    """Raises `InvalidRequest` for what is no string, or no Unicode text: it holds half of a surrogate pair."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds {text[error.start]!r} at position {error.start}, half of a surrogate pair, which is no "
            'character; remove it, for example with text.encode("utf-8", "replace").decode()'
        ) from None


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The stop strings of a request: one, several or none. Raises `InvalidRequest` for an empty one, or no text."""
    stops = (stop,) if isinstance(stop, str) else stop if stop is not None else ()
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
        raise InvalidRequest(f"stop must be a string or a list of strings, none of them empty; got {stop!r}")
    for text in stops:
        unicode_text(text, "a stop string")
    return tuple(stops)
