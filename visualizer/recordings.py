"""Serves recordings to the page: the run so far, those shipped with minipaged, and one given on the command line."""

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
    """The server functions for recordings. A viewer chooses from a fixed list of names, never a path."""

    def __init__(self, log: RecordLog) -> None:
        self._log = log
        self._paths = {path.stem: path for path in sorted(FOLDER.glob("*.jsonl"))}
        self.shipped = list(self._paths)

    def add(self, path: Path) -> str:
        """Checks the recording at ``path``, makes it available to viewers, and returns its name.

        Raises ``ValueError`` if the file is not a recording, or if its events contradict each other.
        """
        events = load_recording(path)
        if not events or events[0].type != "engine_started":
            raise ValueError(f"{path}: not a minipaged recording (its first event must be engine_started)")
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
        """The text of the recording named ``request["name"]``; without a name, that of the run so far."""
        name = request.get("name") if isinstance(request, dict) else None
        if name is None:
            return await asyncio.to_thread(self._run_so_far)
        path = self._paths.get(name) if isinstance(name, str) else None
        if path is None:
            return {"ok": False, "message": "There is no such recording."}
        return {"ok": True, "text": await asyncio.to_thread(path.read_text, encoding="utf-8")}

    async def template(self, request: Any) -> dict[str, Any]:
        """The HTML of an exported page, with a placeholder for the recording."""
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
