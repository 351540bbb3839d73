"""`make gpu-check` without a GPU: the same program on tiny shapes, and its behaviour when a section fails."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import small_run
from benchmarks.gpu.device_timing import compare, rate, spread
from benchmarks.gpu.targets import LARGE, judge
from benchmarks.gpu_check import Section, main, run_sections
from tests.benchmarks.sections import dies, disappoints, exits, fine, hangs, raises

# --- a smoke run of all sections ---


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("smoke") / "gpu.json"
    assert main(["--smoke", "--out", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_smoke_run_has_every_section_and_claims_nothing(smoke):
    assert list(smoke["sections"]) == [section.name for section in gpu_check.SECTIONS]
    assert {section["status"] for section in smoke["sections"].values()} == {"ok"}, smoke["sections"]
    assert smoke["device"] == "cpu" and smoke["smoke"] is True and smoke["machine"]["versions"]["torch"]
    assert smoke["targets"] and all(target["met"] is None for target in smoke["targets"])
    kernels = smoke["sections"]["kernels"]["results"]
    assert kernels["tests"] > 50 and kernels["failures"] == kernels["errors"] == 0
    assert kernels["skipped"] == (0 if torch.cuda.is_available() else kernels["tests"])


def numbers(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_its_numbers_are_finite_and_consistent(smoke):
    sections = {name: section["results"] for name, section in smoke["sections"].items()}
    for name in ("decode", "prefill", "end_to_end"):
        assert len(sections[name]["cells"]) >= 2 and all(map(math.isfinite, numbers(sections[name]))), name
    copy = sections["decode"]["copy_bytes_per_second"]["median"]
    for cell in sections["decode"]["cells"]:
        paged = cell["paged_bytes_per_second"]
        assert 0 < paged["min"] <= paged["median"] <= paged["max"] and paged["runs"] >= 3
        assert cell["fraction_of_copy"] == pytest.approx(paged["median"] / copy) and cell["error"] < 1e-5
        assert cell["sdpa_bytes_per_second"]["median"] > 0 and cell["sdpa_gqa_bytes_per_second"]["median"] > 0
    assert all(cell["error"] < 1e-5 and cell["sdpa_flops"]["median"] > 0 for cell in sections["prefill"]["cells"])
    for cell in sections["end_to_end"]["cells"]:
        ours = cell["minipaged_tokens_per_second"]["median"]
        assert cell["fraction_of_roofline"] == pytest.approx(ours / cell["roofline"])
        theirs = cell["continuous_batching_tokens_per_second"]["median"]
        assert cell["times_continuous_batching"] == pytest.approx(ours / theirs)
        assert cell["same_first_tokens"] == 1  # in float32, on one machine
    assert {case["case"] for case in sections["parity"]["cases"]} >= {"all at once", "preempted: swap"}
    assert all(case["equal"] for case in sections["parity"]["cases"])


# --- sections that fail ---


def section(function, seconds=30.0, needs=0.0) -> Section:
    return Section(function.__name__, f"{function.__module__}:{function.__name__}", seconds, needs)


def test_whatever_happens_in_a_section_is_recorded_and_the_others_go_on():
    functions = [raises, disappoints, dies, exits, fine]
    done = run_sections([*map(section, functions), section(hangs, seconds=4)], 120, smoke=True)
    statuses = {name: found["status"] for name, found in done.items()}
    assert statuses == dict.fromkeys(["raises", "disappoints", "dies", "exits", "hangs"], "failed") | {"fine": "ok"}
    assert done["raises"]["failures"] == ["ValueError: seven is not eight"]
    assert done["disappoints"]["failures"] == ["a kernel is wrong"]
    assert "signal 11" in done["dies"]["failures"][0] and "exit code 3" in done["exits"]["failures"][0]
    assert done["hangs"]["failures"] == ["killed after its 4 s"]
    found = [done[name]["results"]["answer"] for name in ("fine", "raises", "disappoints", "dies", "hangs")]
    assert found == [42, 41, 40, 39, 38]  # their results up to the failure


def test_without_time_left_a_section_is_skipped_and_says_why(capsys):
    done = run_sections([section(fine, needs=100)], 50, smoke=True)
    assert done["fine"]["status"] == "skipped" and "of 50 s are left, and it needs 100 s" in done["fine"]["reason"]
    assert done["fine"]["reason"] in capsys.readouterr().out


@pytest.mark.parametrize("function, code", [(fine, 0), (raises, 1)])
def test_the_exit_code_tells_whether_something_failed(monkeypatch, tmp_path, function, code):
    machine = gpu_check.SECTIONS[0]
    monkeypatch.setattr(gpu_check, "SECTIONS", (machine, section(function)))
    monkeypatch.setenv("OUT", str(tmp_path / "collected"))
    assert main(["--smoke", "--out", str(tmp_path / "deep" / "gpu.json")]) == code
    written = [json.loads((tmp_path / at / "gpu.json").read_text()) for at in ("deep", "collected")]
    assert written[0] == written[1] and written[0]["sections"][function.__name__]["results"]["answer"] > 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the behaviour without a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.json")
    monkeypatch.delenv("OUT", raising=False)
    assert main([]) == 2
    assert "--smoke" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_only_the_sections_that_are_named_run_and_no_result_is_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_check, "SECTIONS", (gpu_check.SECTIONS[0], section(fine), section(raises)))
    monkeypatch.delenv("OUT", raising=False)
    assert main(["--smoke", "--only", "fine"]) == 0
    assert "raises" not in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["--smoke", "--only", "fine,no-such"])
    assert "no section no-such" in capsys.readouterr().err


# --- numbers ---


def test_a_way_that_raises_does_not_end_the_comparison():
    def broken():
        raise RuntimeError("not for this shape\nand much more")

    made = []
    found = compare({"good": lambda: [lambda: made.append(1)] * 2, "bad": broken}, torch.device("cpu"), seconds=1e-3)
    assert found["bad"] == {"error": "RuntimeError: not for this shape"} == rate(found["bad"], 10)
    assert found["good"]["runs"] >= 3 and len(made) >= 2 * (found["good"]["runs"] + 1)
    assert 0 < found["good"]["min"] <= found["good"]["median"] <= found["good"]["max"]


class FakeGPU:
    """The part of torch.cuda that timing needs. Each call takes a millisecond; replaying a graph makes no new calls."""

    def __init__(self, monkeypatch, refuses=()):
        self.made, self.recorded, self.now, self.refuses = [], None, 0.0, refuses
        for name in ("synchronize", "Event", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def call(self, name):
        if self.recorded is not None and name in self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        (self.made if self.recorded is None else self.recorded).append(name)
        self.now += 1.0 if self.recorded is None else 0

    def synchronize(self):
        pass

    def CUDAGraph(self):  # noqa: N802
        class Graph:
            calls = ()
            replay = lambda graph: [self.call(f"replayed {name}") for name in graph.calls]  # noqa: E731

        return Graph()

    @contextmanager
    def graph(self, graph):
        self.recorded = []
        try:
            yield
            graph.calls = tuple(self.recorded)
        finally:
            self.recorded = None

    def Event(self, enable_timing):  # noqa: N802
        assert enable_timing

        class Event:
            record = lambda event: setattr(event, "at", self.now)  # noqa: E731
            synchronize = lambda event: None  # noqa: E731
            elapsed_time = lambda event, end: end.at - event.at  # noqa: E731

        return Event()


def test_on_a_gpu_calls_are_timed_by_events_as_a_graph_if_they_can_be_one(monkeypatch):
    gpu = FakeGPU(monkeypatch, refuses={"waits"})
    ways = {name: lambda name=name: [lambda: gpu.call(name)] * 4 for name in ("ours", "waits")}
    found = compare(ways, torch.device("cuda"), seconds=0.1)
    assert found["ours"] == {"median": 1e-3, "min": 1e-3, "max": 1e-3, "runs": 25, "launched": "CUDA graph"}
    assert found["waits"] == found["ours"] | {"launched": "one by one"}
    turns = gpu.made[-8:]
    assert turns == ["replayed ours"] * 4 + ["waits"] * 4, "the candidates take turns"


def test_the_run_under_the_sanitizer_calls_every_kernel():
    small_run.run(torch.device("cpu"), "torch")


def test_a_nan_is_written_as_a_word(tmp_path):
    gpu_check.write({"cells": [{"error": math.nan, "more": (1.5, None)}]}, [None, tmp_path / "gpu.json"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"cells": [{"error": "nan", "more": [1.5, None]}]}


def test_rates_keep_the_spread_the_right_way_round():
    found = rate(spread([2.0, 4.0, 1.0]), 8)
    assert (found["min"], found["median"], found["max"], found["runs"]) == (2.0, 4.0, 8.0, 3)


def result_of(decode, end):
    cells = [{"batch": b, "context": c, "fraction_of_copy": f} for b, c, f in decode]
    rows = [{"model": "8B", "batch": b, "fraction_of_roofline": r, "times_continuous_batching": t} for b, r, t in end]
    rows.append({"model": "8B", "batch": 1000, "skipped": "no time"})
    return {"decode": {"results": {"cells": cells}}, "end_to_end": {"results": {"cells": rows}}}


def test_targets_are_judged_by_the_worst_of_the_large_cells():
    sections = result_of([(1, 512, 0.1), (256, LARGE // 256, 0.9), (256, 32768, 0.85)], [(1, 0.69, 9), (256, 0.1, 3.5)])
    found = [(target["measured"], target["met"]) for target in judge(sections, smoke=False)]
    assert found == [(0.85, True), (0.69, False), (3.5, True)]
    assert [target["met"] for target in judge(sections, smoke=True)] == [None] * 3


def test_a_target_without_its_measurement_is_neither_met_nor_missed():
    sections = result_of([(256, 32768, None), (256, 8192, 0.9)], [(256, 0.1, None)])
    assert [(t["measured"], t["met"]) for t in judge(sections, smoke=False)] == [(None, None)] * 2
    assert [t["met"] for t in judge({}, smoke=False)] == [None]


def test_the_makefile_calls_it_with_any_python():
    makefile = (Path(gpu_check.__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert "gpu-check:\n\t$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)\n" in makefile
