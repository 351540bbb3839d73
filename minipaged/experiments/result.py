"""The result of an experiment: its numbers beside the paper's, a figure, and its assumptions."""

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
Progress = Callable[[float, str], None]  # (fraction done, current task)


@dataclass(frozen=True)
class Row:
    """One number of ours beside the paper's.

    Attributes:
        what: what was measured.
        ours: the number, in ``unit``.
        paper: the paper's number, as text because it may be a range; ``None`` if it gives none.
        source: where we have the paper's number from: `READ` or `SECONDARY`.
        spread: lowest and highest value of repeated measurements.
        why: why the two numbers differ.
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
        reproduces: the paper and its figure.
        assumed: the assumptions behind the numbers, in sentences.
        data: the figure's data, which is more than the rows.
        seconds: duration of the experiment.
        machine: the machine it ran on, with versions.
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
        """The row with this ``what``. Raises `KeyError`."""
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
        """Writes NAME.json, and NAME.html if plotly is installed. Returns the written paths."""
        directory.mkdir(parents=True, exist_ok=True)
        written = [directory / f"{self.name}.json"]
        written[0].write_text(self.to_json(), encoding="utf-8")
        try:
            from plotly import offline
        except ModuleNotFoundError:
            return written
        from minipaged.experiments.figure_page import figure_page

        page = directory / f"{self.name}.html"
        page.write_text(figure_page(self.figure, self.title), encoding="utf-8")
        library = directory / "plotly.min.js"  # 4.8 MB: once for all pages of the directory
        if not library.exists():
            library.write_text(offline.get_plotlyjs(), encoding="utf-8")
        return [*written, page]


def machine() -> dict[str, Any]:
    """The machine and the versions, as needed to repeat a measurement."""
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
