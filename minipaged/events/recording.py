"""Recordings: events as JSON lines in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from minipaged.events.types import FORMAT, Event, event_from_dict


class Recorder:
    """Subscribes to an engine and keeps every event; with ``path`` also writes them as JSON lines.

    The file's first line is ``{"format": "minipaged-recording/1"}``, each further line one event.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.events: list[Event] = []
        self._file: TextIO | None = None
        if path is not None:
            self._file = open(path, "w", encoding="utf-8")
            self._file.write(json.dumps({"format": FORMAT}) + "\n")

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._file:
            self._file.write(json.dumps(event.to_dict(), separators=(",", ":")) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def load_recording(path: str | Path) -> list[Event]:
    """Reads a recording that `Recorder` wrote. Raises ``ValueError``, naming the line, for any other format."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
            if number > 1:
                events.append(event_from_dict(data))
            elif data.get("format") != FORMAT:
                raise ValueError(f"its first line does not say {FORMAT}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a minipaged recording ({error})") from error
    if not lines:
        raise ValueError(f"{path} is empty, not a minipaged recording")
    return events
