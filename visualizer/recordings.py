"""Recordings for the page: the run so far, those that minipaged comes with, and one chosen on the command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from minipaged.events import FORMAT, load_recording, replay
from visualizer.export import page
from visualizer.log import RecordLog, encode

FOLDER = Path(__file__).resolve().parent / "recordings"


class Recordings:
    """The server functions around recordings. A viewer names one of a fixed list; no path comes from a browser."""

    def __init__(self, log: RecordLog) -> None:
        self._log = log
        self._paths = {path.stem: path for path in sorted(FOLDER.glob("*.jsonl"))}
        self.shipped = list(self._paths)

    def add(self, path: Path) -> str:
        """Checks the recording at ``path`` and returns the name that viewers know it by.

        ``ValueError`` for one that is not a recording, or whose events contradict each other.
        """
        events = load_recording(path)
        if not events or events[0].type != "engine_started":
            raise ValueError(f"{path}: not a minipaged recording (it does not begin with the engine's start)")
        line = 2
        try:
            for _ in replay(events):
                line += 1
        except (LookupError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {line}: not a recording of an engine ({type(error).__name__}: {error})"
            ) from error
        self._paths[path.name] = path
        return path.name

    # Called by the page's JavaScript.

    async def recording(self, request: Any) -> dict[str, Any]:
        """The text of the recording ``request["name"]``; without a name, of the run so far."""
        name = request.get("name") if isinstance(request, dict) else None
        if name is None:
            return await asyncio.to_thread(self._run_so_far)
        path = self._paths.get(name) if isinstance(name, str) else None
        if path is None:
            return {"ok": False, "message": "There is no such recording."}
        return {"ok": True, "text": await asyncio.to_thread(path.read_text, encoding="utf-8")}

    async def template(self, request: Any) -> dict[str, Any]:
        """The page of an exported run, with a gap where the recording goes."""
        return {"html": await asyncio.to_thread(page)}

    def _run_so_far(self) -> dict[str, Any]:
        records = self._log.saved()
        if not records:
            message = "This run is too long to save; Reset or Play again begins a new one."
            return {"ok": False, "message": message}
        lines = [encode({"format": FORMAT})]
        for record in records:
            lines += map(encode, json.loads(record))
        return {"ok": True, "text": "\n".join(lines) + "\n"}
