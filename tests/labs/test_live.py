"""The visualizer's engine with a student's file: ``minipaged visualize --lab A1``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipaged import cli
from minipaged.build import rebuild
from minipaged.cli import visualize_command
from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.labs import find, toy
from minipaged.labs.a5 import checks as a5
from minipaged.labs.checking import check
from minipaged.labs.desk import Desk
from minipaged.labs.live import install, settings_of
from minipaged.labs.student import NotImportable, Violation

LAB = find("A1")
GREEDY = "        block = self.free_blocks.popleft()\n"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    desk = Desk(LAB, tmp_path)
    desk.start()
    desk.file.write_text(LAB.reference())
    return desk


@pytest.fixture
def llm(desk):
    """An object with the attributes of `LLM` that `install` uses."""
    llm = SimpleNamespace(engine=toy.toy_engine())
    install(llm, "a1")
    llm.restart = lambda: setattr(llm, "engine", rebuild(llm.engine))
    llm.restart()
    yield llm
    llm.engine.make_memory.close()


def serve(engine):
    engine.add_request("one", [1, 2, 3], toy.params(6, n=2))
    return toy.run(engine)["one"]


def test_the_engine_runs_on_the_students_pool_and_says_the_same(llm):
    assert serve(llm.engine) == [toy.alone([1, 2, 3], 6, branch) for branch in (0, 1)]
    assert type(llm.engine.memory.pool).__name__ == "ShadowPool"


def test_the_sample_class_is_graded_as_its_files_say():
    """``examples/class``: one handed in the starter, the other a pool that frees a block which is still shared."""
    students = Path(__file__).parents[2] / "examples" / "class"
    assert (students / "ben.py").read_text() == LAB.starter(), "it must follow the lab"
    points = {name: sum(result.points for result in check(LAB, students / f"{name}.py")) for name in ("ada", "ben")}
    assert points["ben"] == 0 < points["ada"] < LAB.points


def test_a_starter_is_refused_with_what_to_do(desk):
    desk.file.write_text(LAB.starter())
    with pytest.raises(InvalidRequest, match="num_free is not written yet .*write it first: minipaged lab watch A1"):
        install(SimpleNamespace(engine=toy.toy_engine()), "a1")


def test_each_restart_reads_the_file_anew_and_a_mistake_stops_the_step_with_its_cause(llm, desk):
    desk.file.write_text(LAB.reference().replace(GREEDY, "        block = self.free_blocks[0]\n"))
    assert serve(llm.engine), "the running engine keeps the old file"
    llm.restart()
    with pytest.raises(Violation, match=r"after allocate\(\), num_free is 16 instead of 15"):
        serve(llm.engine)
    desk.file.write_text("x = (")
    with pytest.raises(NotImportable, match="allocator.py, line 1"):
        llm.restart()
    desk.file.write_text(LAB.reference())
    llm.restart()
    assert serve(llm.engine)


def test_a_scheduler_runs_live_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    desk = Desk(find("A5"), tmp_path)
    desk.start()
    llm = SimpleNamespace(engine=toy.toy_engine(num_blocks=6, block_size=2, max_num_seqs=4, max_num_batched_tokens=4))
    with pytest.raises(InvalidRequest, match="nothing to watch"):
        monkeypatch.delattr(a5, "scheduler", raising=True)
        settings_of("a5")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    desk.file.write_text(desk.lab.reference())
    install(llm, "a5")
    engine = rebuild(llm.engine)
    for number in range(3):
        engine.add_request(f"{number}", [number] * 3, toy.params(6))
    with pytest.raises(InvalidRequest, match="single sequences"):
        engine.add_request("two", [1], toy.params(3, n=2))
    assert not engine.is_unfinished("two")
    assert toy.run(engine) == {f"{number}": [toy.alone([number] * 3, 6)] for number in range(3)}
    engine.add_request("abandoned", [1, 2], toy.params(3))
    engine.step()
    engine.abort("abandoned")
    assert engine.scheduler.read_queues() == [[], []] and engine.memory.pool.num_free == 6
    llm.engine.make_scheduler.close()


def test_what_the_lab_cannot_do_is_refused(llm):
    with pytest.raises(InvalidConfig, match="no prefix caching"):
        toy.toy_engine(llm.engine.make_memory, enable_prefix_caching=True)


def test_a_lab_that_was_not_started_or_cannot_be_watched_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minipaged", "visualize", "--lab", "A1"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2 and "lab start A1" in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match="no lab 'A77'"):
        settings_of("A77")


def test_the_command_line_loads_the_model_and_installs_the_lab(desk, monkeypatch):
    seen = {}
    llm = SimpleNamespace(engine=toy.toy_engine())
    monkeypatch.setattr(visualize_command, "load", lambda model, **settings: seen.update(settings) or llm)

    def launch(make, **options):
        seen.update(options, memory=make().engine.make_memory)

    monkeypatch.setattr(visualize_command, "_visualizer", lambda: launch)
    monkeypatch.setattr(sys, "argv", ["minipaged", "visualize", "--lab", "a1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert seen["enable_prefix_caching"] is False and seen["other_models"] is False
    assert seen["memory"] is llm.engine.make_memory
    seen["memory"].close()
