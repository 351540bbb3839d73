"""Runs one section of the GPU check in a process of its own, and saves its results after every finding.

    python -m benchmarks.gpu.job benchmarks.gpu.end_to_end:measure RESULT.json --seconds 60 [--smoke]

After an illegal memory access, CUDA is unusable in that process, and a kernel may hang. So each section has a process
of its own, and a section that is killed leaves what it found so far.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any


class Job:
    """The context of a section: its device, its time limit, and its results.

    Attributes:
        smoke: everything is tiny and on a CPU; this tests the program, and its numbers mean nothing.
        findings: the section's ``results`` in the file.
        failures: errors found, in sentences; with one or more, the section has failed.
    """

    def __init__(self, path: Path, seconds: float, smoke: bool) -> None:
        self.path, self.smoke = path, smoke
        self.findings: dict[str, Any] = {}
        self.failures: list[str] = []
        self._deadline = time.monotonic() + seconds

    @property
    def device(self) -> Any:
        """The device to test, as torch knows it."""
        import torch  # here, because it is slow and not every section needs it

        return torch.device("cpu" if self.smoke else "cuda")

    def left(self) -> float:
        """Seconds until the section is killed."""
        return self._deadline - time.monotonic()

    def note(self, **findings: Any) -> None:
        """Adds findings and saves all of them."""
        self.findings |= findings
        self.save("unfinished")

    def row(self, table: str, **row: Any) -> None:
        """Adds a row to a table in the findings, saves them and prints the row."""
        self.findings.setdefault(table, []).append(row)
        self.save("unfinished")
        print("   ", ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)

    def fail(self, what: str) -> None:
        """Records a failure; the section continues, to find others."""
        print(f"    FAILED: {what}", flush=True)
        self.failures.append(what)
        self.save("unfinished")

    def save(self, status: str) -> None:
        """Replaces the file atomically, so that a reader never sees half of it."""
        partial = self.path.with_suffix(".partial")
        content = {"status": status, "failures": self.failures, "results": self.findings}
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self.path)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return _short(value.get("median", value.get("error", "?")))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(job: Job, measure: str) -> None:
    """Calls ``module:function`` with the job; an exception is one more failure."""
    module, _, function = measure.partition(":")
    try:
        getattr(import_module(module), function)(job)
    except Exception as error:
        traceback.print_exc()
        job.failures.append(f"{type(error).__name__}: {error}")
    job.save("failed" if job.failures else "ok")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure")
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    job = Job(options.path, options.seconds, options.smoke)
    run(job, options.measure)
    return 1 if job.failures else 0


if __name__ == "__main__":
    sys.exit(main())
