"""What every result file says beside its numbers: when, on what, with which versions."""

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
    """``benchmarks/results/<name>.json``. ``busy``, the load average, tells whether others were at work."""
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
