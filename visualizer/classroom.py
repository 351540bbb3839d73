"""Access control for a classroom: many viewers watch, and only the presenter controls the engine."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from visualizer.experiments import LOOKING

READING = ("attention", "check", *LOOKING)  # read-only commands, allowed for every viewer
REFUSED = "Only the presenter controls this engine; you can freeze, rewind and step what you see."


class Guard:
    """Forwards all commands, or in a classroom only read-only ones and those with the presenter's token."""

    def __init__(self, commands: Callable[[Any], Awaitable[dict[str, Any]]], classroom: bool) -> None:
        self._commands = commands
        self._classroom = classroom
        self.token = secrets.token_urlsafe(18)

    def knows(self, payload: Any) -> bool:
        """Whether the payload has the presenter's token. Compares in constant time, against timing attacks."""
        token = payload.get("token") if isinstance(payload, dict) else None
        given = token.encode("utf-8", "replace") if isinstance(token, str) and len(token) <= 100 else b""
        return self._classroom and hmac.compare_digest(given, self.token.encode())

    async def __call__(self, payload: Any) -> dict[str, Any]:
        if not self._classroom:
            return await self._commands(payload)
        presenter = self.knows(payload)
        if isinstance(payload, dict) and payload.get("do") == "role":
            return {"ok": True, "result": "presenter" if presenter else "viewer"}
        if not presenter and not (isinstance(payload, dict) and payload.get("do") in READING):
            return {"ok": False, "message": REFUSED}
        return await self._commands(payload)
