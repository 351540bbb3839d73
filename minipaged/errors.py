"""The exceptions that minipaged raises on purpose, so that callers can catch each kind.

The ones that a user can cause (`InvalidRequest`, `InvalidConfig`, `ModelError`, `InvalidTrace`) are also
`ValueError`s: input is checked before any state changes, and the message says what to do.
"""

from __future__ import annotations

import os
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


class StepFailed(MinipagedError, RuntimeError):
    """A step raised (out of memory, a kernel error). Its requests were aborted and their blocks freed; the engine
    continues with the others. ``outputs`` holds what the aborted requests had generated."""

    def __init__(self, message: str, outputs: list) -> None:  # of `RequestOutput`; errors import nothing
        super().__init__(message)
        self.outputs = outputs


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
