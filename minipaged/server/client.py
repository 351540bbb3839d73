"""Reading what an OpenAI-compatible server streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from minipaged.errors import MinipagedError

DONE = "[DONE]"


class RequestFailed(MinipagedError, RuntimeError):
    """The server answered with an error, at once or in the midst of a stream."""


def check(response: Any) -> None:
    """Raises `RequestFailed` unless all is well. ``response`` is httpx's, its body read if the status is not 200."""
    if response.status_code != 200:
        raise RequestFailed(f"{response.status_code}: {_message(response.text)}")


def events(response: Any, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises `RequestFailed`, also for an error that comes as an event."""
    check(response)
    for line in lines:
        event = _event(line)
        if event is not None:
            yield event


async def aevents(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """`events` for asyncio, of a response that was checked."""
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
        raise RequestFailed(f"this is no event of OpenAI's: {data[:100]}")
    if "error" in event:
        raise RequestFailed(_message(data))
    return event


def _message(text: str) -> str:
    """The words in an error of OpenAI's shape, else the beginning of whatever it is."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
