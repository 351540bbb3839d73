"""Checking of labs: seeds, shrinking, recordings, and starters generated from the reference."""

from __future__ import annotations

import ast

import pytest

from minipaged.events import load_recording, replay
from minipaged.labs import catalogue
from minipaged.labs.checking import Result, Tape, Trial, check, save_recording, seed_of
from minipaged.labs.lab import Lab, Mutant, Source, Task
from minipaged.labs.student import Local, Violation
from visualizer.recordings import Recordings

LABS = catalogue()
by_key = pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.key)


def test_seeds_depend_on_secret_student_lab_and_task_and_on_nothing_else():
    base = (b"secret", "ann", "A1", "A1.1")
    others = [(b"other", *base[1:]), (b"secret", "bob", "A1", "A1.1"), (b"secret", "ann", "A1", "A1.2")]
    assert seed_of(*base) == seed_of(*base)
    assert len({seed_of(*key) for key in [base, *others]}) == 4


def test_a_failing_trace_is_made_as_short_as_it_can_be():
    def run(trace, tape):
        total = 0
        for step in trace:
            tape.begin(str(step))
            total += step
            if total > 10 and 3 in trace:
                raise Violation(f"{total} is too much", "too much")

    trial = Trial(LABS[0], LABS[0].tasks[0], lambda seconds: Local({}), seed=0)
    with pytest.raises(Violation):
        trial.search([[1, 1], [1, 3, 1, 1, 8, 1, 1, 1, 9, 1]], run)
    steps = [int(line) for line in trial.tape.lines]
    assert sum(steps) > 10 and 3 in steps and len(steps) == 2, "each remaining step should be needed"
    assert [event.type for event in trial.tape.events] == ["step_started", "step_finished", "step_started"]


def test_a_shorter_trace_must_break_the_same_rule():
    def run(trace, tape):
        if len(trace) == 1:
            raise Violation("another thing", "other")
        if len(trace) >= 3:
            raise Violation("the thing", "this")

    trial = Trial(LABS[0], LABS[0].tasks[0], lambda seconds: Local({}), seed=0)
    with pytest.raises(Violation, match="the thing"):
        trial.search([[0] * 8], run)


@by_key
def test_a_starter_is_the_reference_without_the_solutions(lab):
    starter, reference = lab.starter(), lab.reference()
    assert "# lab:" not in starter + reference and "minipaged" not in [
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(reference))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    ]
    keys = {key for keys in lab.spans().values() for key in keys.split(", ")}
    assert keys <= {task.key for task in lab.tasks}
    assert starter.count("raise NotImplementedError(") == len(lab.spans())
    compile(starter, lab.file, "exec")


@by_key
def test_comments_outside_of_solutions_stay_in_the_starter(lab):
    given = [line for line in lab.reference().splitlines() if line.strip().startswith("#")]
    assert all(line in lab.starter() or line in _solutions(lab) for line in given)


def _solutions(lab):
    lines = lab.marked().splitlines()
    return [line for node in lab.spans() for line in lines[node.lineno : node.end_lineno]]


IN_THE_ENGINE = [lab for lab in LABS if any(task.title == "Run in the engine" for task in lab.tasks)]


@pytest.mark.parametrize("lab", IN_THE_ENGINE, ids=lambda lab: lab.key)
def test_a_failure_inside_the_engine_leaves_a_recording_that_the_visualizer_shows(lab, tmp_path):
    """The task that runs the engine detects the first mutant's bug."""
    if lab.needs():
        pytest.skip(lab.needs())
    file = tmp_path / lab.file
    file.write_text(lab.mutants[0].applied(lab.reference()))
    (result,) = check(lab, file, tasks=[lab.tasks[-1].key])
    assert result.status == "fail" and result.trace and result.events[0].type == "engine_started"
    assert result.events[-1].message == result.cause
    save_recording(result.events, tmp_path / "failure.jsonl")
    assert Recordings(None).add(tmp_path / "failure.jsonl") == "failure.jsonl"
    *_, state = replay(load_recording(tmp_path / "failure.jsonl"))
    assert state.error == result.cause and state.requests


def test_a_mutant_must_fit_one_place():
    with pytest.raises(ValueError, match="2 places"):
        Mutant("twice", "A1.1", "x", "y").applied("x x")


def test_sources_can_be_cut_out_of_the_engine():
    """The result has a header, and then the definitions with comments and decorators, in the given order."""
    sources = (Source("minipaged.labs.a4.reference", ("CopyOp",)), Source("minipaged.core.plan", ("Copy",)))
    lab = Lab("A9", "", 1, "x.py", sources, (), (), header="from typing import NamedTuple\n\n\n")
    text = lab.reference()
    assert text.index("class CopyOp(NamedTuple)") < text.index("class Copy(NamedTuple)") and "BlockTables" not in text
    names: dict = {}
    exec(text, names)
    assert names["Copy"](1, 2).dst == 2


def test_a_lab_that_this_machine_cannot_do_is_skipped_with_a_reason(tmp_path):
    lab = Lab("A9", "", 1, "x.py", (), (Task("A9.1", "t", 1),), (), needs=lambda: "Triton needs Linux")
    (result,) = check(lab, tmp_path / "x.py")
    assert (result.status, result.cause, result.points) == ("skip", "Triton needs Linux", 0)


def test_results_are_plain_data_without_events():
    tape = Tape()
    tape.begin("x")
    data = Result("A1.1", "t", 0, 2, "fail", events=tape.events).to_dict()
    assert data["max_points"] == 2 and "events" not in data
