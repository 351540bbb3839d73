"""One section of the GPU check, in a process of its own: what it found is on disk after every finding.

    python -m benchmarks.gpu.job benchmarks.gpu.end_to_end:measure RESULT.json --seconds 60 [--smoke]

An illegal memory access spoils CUDA for the rest of a process, and a kernel may hang. So no section runs in the process
of another, and one that has to be killed leaves what it had found.
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
    """What a section is given: a device, a time limit, and a place for what it finds.

    Attributes:
        smoke: everything tiny, on a CPU: the numbers mean nothing, only that the program works.
        findings: what is written as the section's ``results``.
        failures: what is wrong with what was tested, in sentences. One is enough for the section to fail.
    """

    def __init__(self, path: Path, seconds: float, smoke: bool) -> None:
        self.path, self.smoke = path, smoke
        self.findings: dict[str, Any] = {}
        self.failures: list[str] = []
        self._deadline = time.monotonic() + seconds

    @property
    def device(self) -> Any:
        """The device to test, as torch knows it."""
        import torch  # slow: not every section needs it

        return torch.device("cpu" if self.smoke else "cuda")

    def left(self) -> float:
        """Seconds until the section is killed."""
        return self._deadline - time.monotonic()

    def note(self, **findings: Any) -> None:
        """Adds findings and saves all that there are."""
        self.findings |= findings
        self.save("unfinished")

    def row(self, table: str, **row: Any) -> None:
        """Adds a row to a table among the findings, saves and prints it."""
        self.findings.setdefault(table, []).append(row)
        self.save("unfinished")
        print("   ", ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)

    def fail(self, what: str) -> None:
        """Notes that something is wrong; the section goes on, to tell what else is."""
        print(f"    FAILED: {what}", flush=True)
        self.failures.append(what)
        self.save("unfinished")

    def save(self, status: str) -> None:
        """Replaces the file in one move: whoever reads it finds all or nothing of a state."""
        partial = self.path.with_suffix(".partial")
        content = {"status": status, "failures": self.failures, "results": self.findings}
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self.path)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return _short(value.get("median", value.get("error", "?")))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(job: Job, measure: str) -> None:
    """Calls ``module:function`` with the job. Whatever it raises is one of its failures."""
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
