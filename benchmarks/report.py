"""What every result file says beside its numbers: when, on what, with which versions."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import minipaged

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "gradio", "plotly", "playwright")


def write(name: str, result: dict[str, Any], command: str) -> None:
    """``benchmarks/results/<name>.json``. ``busy``, the load average, tells whether others were at work."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    about = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "busy": [round(load, 2) for load in os.getloadavg()],
        "versions": {"minipaged": minipaged.__version__, "python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }
    path.write_text(json.dumps(about | {"result": result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
