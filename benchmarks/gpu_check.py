"""Checks in 8 minutes that this GPU computes correctly, and how fast: kernel tests, parity, benchmarks.

    make gpu-check                                     all of it; writes benchmarks/results/gpu.json
    python3 -m benchmarks.gpu_check --only decode --out /tmp/decode.json
    python3 -m benchmarks.gpu_check --smoke            tiny, on a CPU: tests this program only

Needs torch, triton, transformers and pytest; minipaged itself need not be installed. Each section has a process and a
time limit of its own, so that a crash or a hang does not stop the others. Exit code: 0 if all sections that ran passed,
1 if one failed, 2 if there is no GPU. A missed target is reported, but is not a failure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.targets import judge, print_report

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
SECONDS = 460.0


@dataclass(frozen=True)
class Section:
    """One part of the check: ``measure`` is a ``module:function`` that is called with a `Job`.

    ``seconds``: its time limit, after which it is killed. ``needs``: it is skipped if less time than this is left.
    """

    name: str
    measure: str
    seconds: float
    needs: float


# Correctness comes before speed. The limits add up to more than SECONDS, because few sections use all of theirs.
SECTIONS = (
    Section("machine", "benchmarks.gpu.machine:measure", 60, 5),
    Section("kernels", "benchmarks.gpu.correctness:kernel_tests", 110, 20),
    Section("parity", "benchmarks.gpu.correctness:parity", 90, 20),
    Section("sanitizer", "benchmarks.gpu.correctness:sanitizer", 70, 20),
    Section("decode", "benchmarks.gpu.attention_speed:decode", 100, 20),
    Section("prefill", "benchmarks.gpu.attention_speed:prefill", 45, 15),
    Section("end_to_end", "benchmarks.gpu.end_to_end:measure", 240, 30),
    Section("flex", "benchmarks.gpu.correctness:flex", 90, 30),
)


def run_sections(sections: Sequence[Section], seconds: float, smoke: bool) -> dict[str, dict[str, Any]]:
    """Runs the sections one by one until the time is over. Returns name → status, results and failures."""
    deadline, done = time.monotonic() + seconds, {}
    for section in sections:
        left = deadline - time.monotonic()
        if left < section.needs:
            reason = f"{left:.0f} s of {seconds:.0f} s are left, and it needs {section.needs:.0f} s"
            done[section.name] = {"status": "skipped", "reason": reason, "results": {}}
            print(f"== {section.name}: skipped, {reason}", flush=True)
            continue
        print(f"== {section.name}", flush=True)
        started = time.monotonic()
        done[section.name] = _run(section, min(section.seconds, left), smoke)
        done[section.name]["seconds"] = round(time.monotonic() - started, 1)
        print(f"   {done[section.name]['status']} after {done[section.name]['seconds']} s", flush=True)
        if section.name == "machine" and done[section.name]["status"] != "ok":
            break  # without a GPU there is nothing to test
    return done


def _run(section: Section, seconds: float, smoke: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.gpu.job", section.measure, str(path)]
        command += [f"--seconds={seconds}", *(["--smoke"] if smoke else [])]
        # No library may download: a machine with a GPU is often offline, and a download would wait for its timeout.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code, ended = process.wait(timeout=seconds), ""
        except subprocess.TimeoutExpired:
            code, ended = 1, f"killed after its {seconds:.0f} s"
        finally:
            _kill(process)  # and all its child processes
        if code < 0:
            ended = f"died of signal {-code}"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"failures": [], "results": {}}
    if ended or code and not found["failures"]:
        found["failures"].append(ended or f"ended with exit code {code} and said nothing")
    return found | {"status": "failed" if found["failures"] else "ok"}


def _kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--smoke", action="store_true", help="tiny and on a CPU")
    parser.add_argument("--only", help=f"comma-separated sections beside 'machine': {', '.join(names[1:])}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together (%(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the result; default: benchmarks/results/gpu.json "
                        "for a full check, nowhere otherwise")  # fmt: skip
    options = parser.parse_args(arguments)
    only = options.only.split(",") if options.only else names
    if unknown := set(only) - set(names):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    started = time.monotonic()
    chosen = [section for section in SECTIONS if section.name in only or section.name == "machine"]
    sections = run_sections(chosen, options.seconds, options.smoke)
    if not options.smoke and sections["machine"]["status"] != "ok":
        print("There is no GPU that torch can use here; --smoke tests this program without one.", file=sys.stderr)
        return 2
    result = {
        "smoke": options.smoke,
        "device": sections["machine"]["results"].get("device"),
        "machine": sections["machine"]["results"],
        "seconds": round(time.monotonic() - started, 1),
        "time_limit": options.seconds,
        "targets": judge(sections, options.smoke),
        "sections": sections,
    }
    print_report(result)
    whole = not options.smoke and not options.only
    write(result, [options.out or (RESULT if whole else None), _collected()])
    return int(any(section["status"] == "failed" for section in sections.values()))


def _collected() -> Path | None:
    """A path in the job runner's output folder, if $OUT names one."""
    return Path(os.environ["OUT"]) / "gpu.json" if os.environ.get("OUT") else None


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by strings: wrong results must be recorded, too."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(result: dict[str, Any], paths: Sequence[Path | None]) -> None:
    """Writes the result as JSON to each path that is not ``None``."""
    text = json.dumps(_finite(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    for path in filter(None, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"Written to {path}")


if __name__ == "__main__":
    sys.exit(main())
