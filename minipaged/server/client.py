"""Reads the event stream of an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from minipaged.errors import MinipagedError

DONE = "[DONE]"


class RequestFailed(MinipagedError, RuntimeError):
    """The server answered with an error, either as its status or within a stream."""


def check(response: Any) -> None:
    """Raises `RequestFailed` unless the status of this httpx response is 200. Its body must have been read if not."""
    if response.status_code != 200:
        raise RequestFailed(f"{response.status_code}: {_message(response.text)}")


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
        raise RequestFailed(_message(data))
    return event


def _message(text: str) -> str:
    """The message of an OpenAI error, or else the first 200 characters of ``text``."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
