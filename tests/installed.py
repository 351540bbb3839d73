"""Tries an installed minipaged as a user would, away from the repository: ``make wheel-check`` runs it.

It imports nothing of the repository, and runs in the environment that the wheel was installed into.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import minipaged


def command(*args: str) -> str:
    """What a command prints. An error ends the check."""
    done = subprocess.run([Path(sys.executable).with_name("minipaged"), *args], capture_output=True, text=True)
    assert done.returncode == 0, f"minipaged {' '.join(args)}: {done.returncode}\n{done.stdout}{done.stderr}"
    print(f"ok  minipaged {' '.join(args)}", flush=True)
    return done.stdout


def main() -> None:
    home = Path(minipaged.__file__).parent
    assert home.is_relative_to(sys.prefix), f"this is not the installed package: {home}"
    assert json.loads(command("doctor", "--json"))["can_run"]
    answer = command("generate", "--temperature", "0", "--max-tokens", "40", "Once upon a time")
    assert len(answer.split()) > 10, answer
    assert "latency" in command("experiments", "list")
    command("tutorials")
    pages = sorted(Path("minipaged-tutorials").glob("[0-9]*.md"))
    assert len(pages) >= 13
    subprocess.run([sys.executable, pages[2].with_suffix(".py")], check=True, stdout=subprocess.DEVNULL)
    print(f"ok  python {pages[2].with_suffix('.py')}")
    command("lab", "start", "A1")
    assert Path("a1/allocator.py").exists()

    from visualizer.app import launch
    from visualizer.experiments import EARLIER
    from visualizer.recordings import FOLDER

    assert len([*EARLIER.glob("*.json")]) >= 16 and [*FOLDER.glob("*.jsonl")]
    visualizer = launch(port=7899, block=False)
    with urllib.request.urlopen(visualizer.url, timeout=60) as page:
        assert b"minipaged" in page.read()
    visualizer.close()
    print(f"ok  the page, on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
