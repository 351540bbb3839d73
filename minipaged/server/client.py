"""Reads the event stream of an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from minipaged.errors import MinipagedError

DONE = "[DONE]"
TOO_LONG = "context_length_exceeded"  # the error's code if a prompt is too long


class RequestFailed(MinipagedError, RuntimeError):
    """The server answered with an error, either as its status or within a stream. ``code``: OpenAI's, if it has one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


def check(response: Any) -> None:
    """Raises `RequestFailed` unless the status of this httpx response is 200. Its body must have been read if not."""
    if response.status_code != 200:
        message, code = _error(response.text)
        raise RequestFailed(f"{response.status_code}: {message}", code)


def events(response: Any, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises `RequestFailed`, also for an error event."""
    check(response)
    for line in lines:
        event = _event(line)
        if event is not None:
            yield event


async def aevents(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """`events` for asyncio; call `check` on the response first."""
    async for line in lines:
        event = _event(line)
        if event is not None:
            yield event


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("data:") or (data := line[5:].strip()) == DONE:
        return None
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise RequestFailed(f"not an event of OpenAI's API: {data[:100]}")
    if "error" in event:
        raise RequestFailed(*_error(data))
    return event


def _error(text: str) -> tuple[str, str | None]:
    """The message and the code of an OpenAI error, or else the first 200 characters of ``text``."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:200], None
