"""The page's reducer and player in node: no browser, so many more runs than in the tests of the page."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from minipaged.core.request import Request
from minipaged.core.seams import FCFS
from minipaged.events import State, event_from_dict
from minipaged.events.types import EVENT_TYPES
from tests import golden
from tests.visualizer import script_types

STATIC = Path(__file__).parents[2] / "visualizer" / "static"


class ThreeRanks(FCFS):
    def rank(self, request: Request) -> float:
        return request.arrival % 3


CONFIGURATIONS = golden.CONFIGURATIONS | {
    "ranks": {"admission_policy": ThreeRanks},
    "ranks, swap": {"admission_policy": ThreeRanks} | golden.SWAP,
}


LONG = ["seeking", "stepping", "others", "following", "forgetting", "memory", "reasons"]  # checked with one long run


def node() -> str:
    """The path of node: the machine's own, or the one in playwright's package."""
    found = shutil.which("node")
    if found is None:
        driver = pytest.importorskip("playwright._impl._driver", reason="node is not installed: apt-get install nodejs")
        found = str(driver.compute_driver_executable()[0])
    return found


def run_of(name: str, seed: int, monkeypatch: Any) -> dict[str, Any]:
    """The records of a random run, one for each step, and the states that Python's reducer computes."""
    started: list[dict[str, Any]] = []

    def noting(make: Any) -> Any:
        def made(**settings: Any) -> Any:
            engine = make(**settings)
            started.append(engine.started_event().to_dict())
            return engine

        return made

    with monkeypatch.context() as patched:
        patched.setattr(golden, "fake_engine", noting(golden.fake_engine))
        patched.setattr(golden, "virtual_engine", noting(golden.virtual_engine))
        events = [event for event in golden.events_of(f"{name}/{seed}", **CONFIGURATIONS[name]) if "type" in event]
    state, states = State(), []
    records: list[list[dict[str, Any]]] = [[]]
    for event in [*started, *events]:
        records[-1].append(event)
        if event["type"] == "step_finished":
            records.append([])
    records = [record for record in records if record]
    for record in records:
        for event in record:
            state.apply(event_from_dict(json.loads(json.dumps(event))))
        states.append(json.loads(json.dumps(state.to_dict())))
    return {"records": records, "states": states}


def test_the_scripts_types_of_events_are_those_of_python() -> None:
    text = script_types.FILE.read_text(encoding="utf-8")
    assert script_types.rewritten(text) == text, "python -m tests.visualizer.script_types --write"
    assert 'interface Forked { type: "forked"; parent: number; child: number; request_id: string }' in text
    assert "reason?: string" in script_types.interface("Evicted", EVENT_TYPES["evicted"], "evicted")


def test_reducer_and_player_agree_with_python(tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(STATIC, tmp_path / "static", ignore=shutil.ignore_patterns("*.css", "*.html", "*.woff2"))
    (tmp_path / "static" / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    runs = [run_of(name, seed, monkeypatch) for seed in (1, 2) for name in CONFIGURATIONS]
    told = {event["type"] for run in runs for record in run["records"] for event in record}
    assert {"forked", "copied", "preempted", "swapped_in", "group_started", "speculated", "evicted"} <= told
    longest = max(runs, key=lambda run: len(run["records"]))
    for run in runs:
        run["checks"] = ["reducer"] + LONG * (run is longest)
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    script = Path(__file__).with_name("scripts.mjs")
    done = subprocess.run(
        [node(), script, tmp_path / "static", file], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(" ok\n") == len(runs) + len(LONG)
