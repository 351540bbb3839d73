"""Experiments of the page, without a browser: the process, its protocol, and the answers to commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged.experiments import Result, Row, catalogue
from tests.aio import run
from visualizer import experiments as module
from visualizer.classroom import Guard
from visualizer.experiments import LOOKING, Experiments, menu

NAMES = [entry.name for entry in catalogue()]
FIGURE = {"data": [{"type": "bar", "x": ["a"], "y": [1]}], "layout": {"title": {"text": "T"}}}
MACHINE = dict(cpu="abacus", cores=2, memory_gib=1, system="Linux", python="3", torch="none", date="now")


def result(name: str, quick: bool = False) -> Result:
    rows = [Row("saved", 12.34, "%", "10*", "secondary source", why="dice"), Row("lost", 5.0)]
    return Result(rows, FIGURE, ["Assumed."], name=name, quick=quick, seconds=3.0, machine=MACHINE)


def worker(code: str) -> tuple[str, ...]:
    """The command of a process that runs ``code``, in which ``say(**message)`` prints a line of the protocol."""
    return sys.executable, "-c", f"import json, sys, time\ndef say(**m): print(json.dumps(m), flush=True)\n{code}"


def saying(one: Result) -> tuple[str, ...]:
    return worker(f"say(done=0.5, text='halfway')\nsay(result=json.loads({one.to_json()!r}))")


SLEEPS = worker("say(done=0.25, text='a quarter')\ntime.sleep(600)")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[Experiments] = []

    def build(worker: tuple[str, ...], earlier: Path = tmp_path) -> Experiments:
        made.append(Experiments(earlier, worker))
        return made[-1]

    yield build
    for experiments in made:
        experiments.close()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(experiments: Experiments) -> Any:
    return experiments.state()["running"]


def test_a_result_is_kept_and_shown_in_words(make: Any) -> None:
    experiments = make(saying(result("waste", quick=True)))
    assert experiments({"do": "experiment-run", "name": "waste", "quick": True}) == {"ok": True, "result": None}
    until(lambda: not running(experiments))
    assert experiments.state() == {"running": None, "ended": None, "results": {"waste": 1}}
    (view,) = experiments({"do": "experiment", "name": "waste"})["result"]
    assert view["here"] and view["quick"] and view["secondary"] and view["figure"] == FIGURE
    assert view["rows"][0] == {"what": "saved", "paper": "10**", "ours": "12.3 %", "why": "dice"}
    assert view["rows"][1]["paper"] == "–" and "abacus" in view["machine"]
    experiments({"do": "experiment-run", "name": "waste"})
    until(lambda: not running(experiments))
    assert experiments.state()["results"] == {"waste": 2}, "a newer result, which pages fetch"


def test_progress_one_at_a_time_and_cancel(make: Any) -> None:
    experiments = make(SLEEPS)
    experiments.start("waste", False)
    until(lambda: running(experiments)["text"] == "a quarter")
    assert running(experiments)["name"] == "waste" and running(experiments)["done"] == 0.25
    process = experiments._run.process
    answer = experiments({"do": "experiment-run", "name": "latency"})
    assert not answer["ok"] and "waste" in answer["message"] and "one at a time" in answer["message"]
    experiments({"do": "experiment-cancel"})
    until(lambda: not running(experiments))
    assert process.poll() is not None and experiments.state()["ended"]["cancelled"]
    assert experiments({"do": "experiment-cancel"})["ok"], "without a process, cancelling is no error"
    experiments.start("latency", True)
    assert experiments.state()["ended"] is None and running(experiments)["quick"]


@pytest.mark.parametrize(
    "code, message",
    [
        ("say(error='ValueError: seven')", "ValueError: seven"),
        ("sys.exit(3)", "code 3"),
        ("import os; os.abort()", "before it was done"),
        ("print('no json'); say(done=1); say(result={'rows': 1}); sys.exit(1)", "code 1"),
    ],
    ids=["raised", "exit", "crash", "nonsense"],
)
def test_a_failure_is_told(make: Any, code: str, message: str) -> None:
    experiments = make(worker(code))
    experiments.start("waste", False)
    until(lambda: not running(experiments))
    ended = experiments.state()["ended"]
    assert ended["name"] == "waste" and message in ended["message"] and not ended["cancelled"]
    assert experiments.state()["results"] == {}


def test_a_process_that_cannot_start_is_told(make: Any) -> None:
    answer = make(("/nowhere/python",))({"do": "experiment-run", "name": "waste"})
    assert not answer["ok"] and "cannot be started" in answer["message"]


@pytest.mark.parametrize("name", [None, 3, "", "../waste", "no-such", ["waste"]])
@pytest.mark.parametrize("command", ["experiment", "experiment-run"])
def test_only_what_is_in_the_catalogue_is_run(make: Any, command: str, name: Any) -> None:
    answer = make(("/nowhere/python",))({"do": command, "name": name})
    assert not answer["ok"] and "no experiment" in answer["message"]


def test_earlier_results_are_shown_beside_new_ones(make: Any, tmp_path: Path) -> None:
    result("waste").write(tmp_path)
    (tmp_path / "latency.json").write_text("{}")
    (tmp_path / "mapping.json").write_text("not json")
    nameless = {"rows": [{"what": "x", "ours": 1.0, "spread": None}], "figure": {}}
    (tmp_path / "chatbot.json").write_text(json.dumps(nameless))
    experiments = make(saying(result("waste", quick=True)))
    assert experiments.state()["results"] == {"waste": 0}, "an unreadable result is omitted"
    assert [view["here"] for view in experiments.results("waste")] == [False]
    experiments.start("waste", True)
    until(lambda: not running(experiments))
    assert [(view["here"], view["quick"]) for view in experiments.results("waste")] == [(True, True), (False, False)]


def test_a_closed_server_leaves_no_process_behind(make: Any) -> None:
    experiments = make(SLEEPS)
    experiments.start("waste", False)
    process = experiments._run.process
    experiments.close()
    assert process.wait(timeout=30) != 0


async def _guarded(guard: Guard, **payload: Any) -> bool:
    return (await guard(payload))["ok"]


@pytest.mark.parametrize("command, open_to_all", [*[(name, True) for name in LOOKING], ("experiment-run", False),
                                                  ("experiment-cancel", False)])  # fmt: skip
def test_in_a_classroom_only_the_presenter_starts_and_stops(make: Any, command: str, open_to_all: bool) -> None:

    experiments = make(SLEEPS)

    async def door(payload: Any) -> dict[str, Any]:
        return experiments(payload)

    guard = Guard(door, classroom=True)
    assert run(_guarded(guard, do=command, name="waste")) == open_to_all
    assert run(_guarded(guard, do=command, name="waste", token=guard.token))


class TestTheProcess:
    """`visualizer.experiments` as a program, with a short experiment."""

    def test_a_real_one_goes_through(self, make: Any) -> None:
        """Runs the shortest experiment of the catalogue in a real process."""
        experiments = make(module.WORKER)
        experiments.start("waste", True)
        until(lambda: running(experiments) is None or running(experiments)["done"] > 0)
        assert experiments.state()["ended"] is None
        assert "waste" in experiments.state()["results"] or running(experiments)["text"] != "starting"

    def test_what_it_tells(self, monkeypatch: Any) -> None:
        said: list[dict[str, Any]] = []

        def fake(name: str, quick: bool, progress: Callable[[float, str], None]) -> Result:
            progress(0.5, "half")
            if name == "latency":
                raise RuntimeError("no luck")
            return result(name, quick)

        monkeypatch.setattr(module, "run", fake)
        for name in ("waste", "latency"):
            module._measure(name, True, lambda **message: said.append(message))
        assert said[0] == said[2] == {"done": 0.5, "text": "half"}
        assert Result.from_json(json.dumps(said[1]["result"])).quick and said[3] == {"error": "RuntimeError: no luck"}

    def test_it_ends_when_nobody_listens(self, monkeypatch: Any) -> None:
        def gone(**message: Any) -> None:
            raise BrokenPipeError

        monkeypatch.setattr(module, "run", lambda name, quick, progress: progress(0.1, ""))
        module._measure("waste", True, gone)


def test_the_menu_has_all_of_them() -> None:
    assert [entry["name"] for entry in menu()] == NAMES
    assert all(entry["title"] and entry["figure"] and entry["minutes"] > 0 for entry in menu())
