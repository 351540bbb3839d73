"""``minipaged doctor``: reports what is installed, what this machine supports, and what each missing part affects."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.text import Text

# Package → what does not work without it. The engine itself needs only the first three.
PACKAGES = {
    "torch": "nothing runs without it",
    "safetensors": "no weights can be read",
    "transformers": "text cannot be turned into tokens",
    "triton": "no kernels for CUDA: attention runs in plain torch (Triton exists only for Linux)",
    "gradio": "`minipaged visualize` cannot start: pip install gradio",
    "plotly": "`minipaged visualize` cannot start: pip install plotly",
    "fastapi": "`minipaged serve` and `batch` cannot start: pip install fastapi uvicorn",
    "uvicorn": "`minipaged serve` cannot start: pip install fastapi uvicorn",
    "prometheus_client": "the server has no /metrics: pip install prometheus-client",
}
NEEDED = {"python", "torch", "safetensors", "transformers", "embedded model"}
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FORWARDS = {  # attention backend → the code that computes a step
    "native": "one C++ call per step (minipaged/kernels/forward.h); minipaged/models/ with --attention torch",
    "torch": "minipaged/models/, in plain torch",
    "triton": "minipaged/models/ on Triton kernels; decode steps are replayed as CUDA graphs",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


def report(console: Console) -> bool:
    """Prints one line per check. Returns whether the engine itself can run."""
    fit = True
    for check in checks():
        mark = Text("ok     ", "green") if check.ok else Text("missing", "yellow")
        console.print(Text.assemble(mark, f"  {check.name:<15} {check.detail}"), soft_wrap=True)
        fit &= check.ok or check.name not in NEEDED
    return fit


def report_json() -> bool:
    """Prints the checks as one JSON object: name → ok, detail. Returns whether the engine itself can run."""
    found = list(checks())
    fit = all(check.ok or check.name not in NEEDED for check in found)
    described = {check.name: {"ok": check.ok, "detail": check.detail} for check in found}
    print(json.dumps({"can_run": fit, "checks": described}, indent=2))
    return fit


def checks() -> Iterator[Check]:
    """Yields all checks, each run when it is requested: the last ones take a few seconds."""
    yield Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer is needed)")
    for package, without in PACKAGES.items():
        yield _package(package, without)
    yield _cpu()
    yield from _accelerators()
    yield from _attention()
    yield _chromium()
    yield _embedded_model()


def _package(package: str, without: str) -> Check:
    try:
        return Check(package, True, metadata.version(package))
    except metadata.PackageNotFoundError:
        return Check(package, False, without)


def _cpu() -> Check:
    import psutil

    flags = _cpu_flags()
    native = flags & {"avx512_bf16", "amx_bf16", "bf16"}
    speed = "fast, and --dtype auto uses it for large models stored in it" if native else "slow here: use float32"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB memory"
    found = ", ".join(flag for flag in CPU_FLAGS if flag in flags) or platform.machine()
    return Check("cpu", True, f"{os.cpu_count()} cores, {memory}, {found}; bfloat16 is {speed}")


def _cpu_flags() -> set[str]:
    """The processor's feature flags; empty except on Linux, since other systems need extra tools to read them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()[2:]}


def _accelerators() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything, and the report should show it
        yield Check("gpu", False, f"torch cannot be imported: {error}")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", True, f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", True, "Apple GPU; choose it with --device mps")
    elif not torch.cuda.device_count():
        yield Check("gpu", False, "everything runs on the CPU, which is enough for the embedded model")


def _attention() -> Iterator[Check]:
    """The backend that ``attention="auto"`` selects on this machine, and the code that then computes a step."""
    try:
        from minipaged.kernels.backend import choose
        from minipaged.models.loader import device_of

        name, why = choose("auto", device_of("auto"))
    except Exception as error:  # torch is broken; an earlier line of the report says how
        yield Check("attention", False, f"cannot run: {error}")
        return
    yield Check("attention", True, f"{name}: {why}")
    yield Check("forward", True, FORWARDS[name])


def _chromium() -> Check:
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    return Check("chromium", path is not None, path or "only the browser tests need it; they are skipped")


def _embedded_model() -> Check:
    try:
        from minipaged.models.loader import load_model

        loaded = load_model("tiny", "cpu")
    except Exception as error:  # the report must continue after any error
        return Check("embedded model", False, f"cannot be loaded: {error}")
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return Check("embedded model", True, f"{parameters / 1e6:.1f} million parameters, {loaded.directory}")
