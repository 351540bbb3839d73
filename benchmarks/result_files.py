"""Writes result files: the numbers, with the command, the machine, the versions and the date."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from minipaged.experiments.result import machine

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("gradio", "plotly", "playwright")


def write(name: str, result: dict[str, Any], command: str) -> None:
    """Writes ``benchmarks/results/<name>.json``. ``busy`` is the load average, to tell whether the machine was idle."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    versions = {package: _version(package) for package in PACKAGES}
    about = {
        "command": command,
        "machine": machine() | {name: version for name, version in versions.items() if version},
        "busy": [round(load, 2) for load in os.getloadavg()],
    }
    path.write_text(json.dumps(about | {"result": result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
