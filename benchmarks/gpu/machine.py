"""Records the machine, its GPU and the versions of the packages."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from benchmarks.gpu.job import Job

PACKAGES = ("torch", "triton", "transformers", "flashinfer-python")


def measure(job: Job) -> None:
    """Records machine and versions. Fails without CUDA, except in a smoke run, which uses the CPU."""
    job.note(
        device="cpu" if job.smoke else "cuda",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=os.cpu_count(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
        commit=_printed("git", "rev-parse", "HEAD"),
    )
    if job.smoke:
        return
    import torch

    if not torch.cuda.is_available():
        job.fail("torch finds no CUDA device")
        return
    gpu = torch.cuda.get_device_properties(0)
    job.note(
        gpu=gpu.name,
        driver=_printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        capability=f"{gpu.major}.{gpu.minor}",
        multiprocessors=gpu.multi_processor_count,
        memory_gib=round(gpu.total_memory / 2**30, 1),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _printed(*command: str) -> Any:
    """The first line that a command prints; ``None`` if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
