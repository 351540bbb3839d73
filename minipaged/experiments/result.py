"""What an experiment hands back: numbers beside the paper's, a figure, and what was assumed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

READ, SECONDARY = "read in the paper", "secondary source"
Progress = Callable[[float, str], None]  # (done so far, from 0 to 1; what is being done)


@dataclass(frozen=True)
class Row:
    """One number of ours beside the paper's.

    Attributes:
        what: what was measured.
        ours: the number, in ``unit``.
        paper: the paper's, as text because it may be a range; ``None`` where it has none.
        source: where the paper's number is from: `READ` or `SECONDARY`.
        spread: lowest and highest of repeated measurements.
        why: why the two differ.
    """

    what: str
    ours: float
    unit: str = ""
    paper: str | None = None
    source: str | None = None
    spread: tuple[float, float] | None = None
    why: str = ""


@dataclass
class Result:
    """A finished experiment. ``figure`` is a Plotly figure as a dict; nothing here needs plotly.

    Attributes:
        reproduces: the figure of which paper.
        assumed: what the numbers rest on, in sentences.
        data: what the figure was drawn from, for those who want more than the rows.
        seconds: how long the experiment took.
        machine: where it ran, with versions.
    """

    rows: list[Row]
    figure: dict[str, Any]
    assumed: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    title: str = ""
    reproduces: str = ""
    quick: bool = False
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)

    def row(self, what: str) -> Row:
        """The row of that name. Raises `KeyError`."""
        for row in self.rows:
            if row.what == what:
                return row
        raise KeyError(what)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The inverse of `to_json`."""
        data = json.loads(text)
        rows = [Row(**row | {"spread": row["spread"] and tuple(row["spread"])}) for row in data.pop("rows")]
        return cls(rows, **data)

    def write(self, directory: Path) -> list[Path]:
        """Writes NAME.json, and NAME.html where plotly is installed; returns what was written."""
        directory.mkdir(parents=True, exist_ok=True)
        written = [directory / f"{self.name}.json"]
        written[0].write_text(self.to_json(), encoding="utf-8")
        try:
            from plotly import io
        except ModuleNotFoundError:
            return written
        page = directory / f"{self.name}.html"
        # The library goes beside the pages, once for all of them.
        io.write_html(self.figure, page, include_plotlyjs="directory", auto_open=False)
        return [*written, page]


def machine() -> dict[str, Any]:
    """What a reader needs to know to repeat a measurement."""
    import psutil

    versions = {}
    for package in ("minipaged", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a simulation needs neither
            versions[package] = "not installed"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
