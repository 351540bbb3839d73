"""The ``minipaged lab`` commands, in this process, and the files that they write."""

from __future__ import annotations

import json
import sys
import threading
import zipfile
from types import SimpleNamespace

import pytest

from minipaged import cli
from minipaged.cli import lab_commands
from minipaged.events import load_recording, replay
from minipaged.labs import find
from minipaged.labs.a1 import checks

LAB = find("A1")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run(*args)`` runs a lab command in an empty folder → (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str):
        monkeypatch.setattr(sys, "argv", ["minipaged", "lab", *args])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        return leaving.value.code, captured.out, captured.err

    return run


@pytest.fixture
def desk(run, tmp_path):
    """A started lab. ``desk.write(text)`` writes the student's file."""
    code, out, _ = run("start", "a1")
    file = tmp_path / "a1" / "allocator.py"
    assert code == 0 and str(file) in out
    return SimpleNamespace(run=run, folder=file.parent, file=file, write=file.write_text)


def mutant(task: str) -> str:
    """A file with a bug that the checks of this task detect."""
    return next(mutant for mutant in LAB.mutants if mutant.task == task).applied(LAB.reference())


def test_list_shows_all_labs_and_how_far_one_is(desk):
    code, out, _ = desk.run("list")
    assert code == 0 and "0 of 10 points" in out and "not started" in out
    desk.write(LAB.reference())
    desk.run("check")
    assert "10 of 10 points" in desk.run("list")[1]


def test_the_first_check_says_that_red_is_expected_and_later_ones_do_not(desk):
    code, out, _ = desk.run("check")
    assert code == 1 and "Red is expected" in out and "blocked by A1.1" in out and "0 of 10 points" in out
    code, out, _ = desk.run("check", "a1")
    assert code == 1 and "Red is expected" not in out


def test_a_solution_passes_from_inside_the_folder_too(desk, monkeypatch):
    desk.write(LAB.reference())
    monkeypatch.chdir(desk.folder)
    code, out, _ = desk.run("check")
    assert code == 0 and "10 of 10 points" in out and "lab diff A1" in out
    assert "Red is expected" not in out, "the first check, but no task fails"
    assert json.loads((desk.folder / "progress.json").read_text())["passed"]["A1.3"] == 3


def test_a_failure_says_the_cause_the_shortest_trace_and_the_command_that_replays_it(desk):
    desk.write(mutant("A1.2"))  # frees a block when its first owner frees it
    code, out, _ = desk.run("check")
    assert code == 1
    (line,) = (line for line in out.splitlines() if "✗" in line)
    assert line.endswith("after decref(0), num_free is 2 instead of 1"), "the message has the call and the rule"
    steps = [line.strip() for line in out.splitlines() if line.startswith("        ")]
    assert steps == ["allocate() → 0", "incref(0)", "decref(0)"]
    assert "minipaged lab replay A1" in out
    events = load_recording(desk.folder / "failure.jsonl")
    assert [event.type for event in events if event.type in ("allocated", "shared", "freed", "engine_error")] == [
        "allocated", "shared", "freed", "engine_error",
    ]  # fmt: skip
    *_, state = replay(events)
    assert state.error and state.error.startswith("after decref(0)")


def test_replay_opens_the_visualizer_on_the_failure(desk, monkeypatch):
    shown = {}
    monkeypatch.setattr(lab_commands, "visualize", lambda **options: shown.update(options))
    code, _, err = desk.run("replay", "A1")
    assert code == 2 and "no failure of A1 has been recorded" in err
    desk.write(mutant("A1.1"))
    desk.run("check")
    code, _, _ = desk.run("replay", "a1", "--port", "7999")
    assert code == 0 and shown["port"] == 7999 and shown["replay"] == desk.folder / "failure.jsonl"
    desk.write(LAB.reference())
    desk.run("check")
    assert desk.run("replay", "A1")[0] == 2, "a fixed failure is not replayed"


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [("x = (", 3, "allocator.py, line 1"), ("class BlockPool: pass", 1, "takes no arguments"), ("", 1, "no BlockPool")],
)
def test_exit_codes_for_files_that_are_no_answer(desk, source, code, said):
    desk.write(source)
    got, out, _ = desk.run("check")
    assert got == code and said in out and "0 of 10" in out


def test_exit_code_for_what_never_ends(desk, monkeypatch):
    monkeypatch.setattr("minipaged.labs.checking.MIN_SECONDS", 0.5)
    monkeypatch.setattr("minipaged.labs.checking.TIMES_REFERENCE", 0)
    desk.write(LAB.reference().replace("        return block", "        while True: pass"))
    code, out, _ = desk.run("check")
    assert code == 4 and "seconds for this task were over" in out


def test_exit_code_for_a_bug_of_the_checks(desk, monkeypatch):
    monkeypatch.setitem(checks.CHECKS, "A1.1", lambda trial: 1 / 0)
    code, _, err = desk.run("check")
    assert code == 70 and "not yours" in err and "ZeroDivisionError" in err


@pytest.mark.parametrize("args", [["start", "b9"], ["check", "A4"], ["hint", "A1.9"], ["diff", "a4"], ["pack", "A4"]])
def test_exit_code_for_a_wrong_command(desk, args):
    code, _, err = desk.run(*args)
    assert code == 2 and err.startswith("minipaged: ") and len(err.splitlines()) == 1


def test_start_overwrites_nothing(desk):
    desk.write("mine")
    code, _, err = desk.run("start", "A1")
    assert code == 2 and "lab reset A1" in err and desk.file.read_text() == "mine"


def test_nothing_started_says_how_to(run):
    code, _, err = run("check")
    assert code == 2 and "lab start A1" in err


def test_hints_come_one_by_one_and_the_last_one_stays(desk):
    shown = [desk.run("hint", "a1.2")[1] for _ in range(4)]
    assert [text.splitlines()[0] for text in shown] == [f"Hint {n} of 3 for A1.2" for n in (1, 2, 3, 3)]
    assert len(set(shown)) == 3 and shown[3].strip().endswith(LAB.hints()["A1.2"][2])
    assert desk.run("hint", "A1.1")[1].startswith("Hint 1")


def test_the_reference_is_shown_only_for_what_has_passed(desk):
    code, out, err = desk.run("diff", "A1.1")
    assert code == 2 and "--give-up" in err and "popleft" not in out + err
    code, out, _ = desk.run("diff", "A1.1", "--give-up")
    assert code == 0 and "popleft" in out
    assert json.loads((desk.folder / "progress.json").read_text())["gave_up"] == ["A1.1"]
    desk.write(mutant("A1.3"))
    desk.run("check")
    code, out, _ = desk.run("diff", "A1")
    assert code == 0 and "A1.3 Refuse misuse: shown when it passes" in out
    assert "_check_used(" not in out.split("A1.3")[1]


def test_diff_shows_only_the_functions_of_the_task(desk):
    longer = "self.ref_counts[block] = self.ref_counts[block] + 1"
    desk.write(LAB.reference().replace("self.ref_counts[block] += 1", longer))
    desk.run("check")
    out = desk.run("diff", "A1.2")[1]
    assert "+        self.ref_counts[block] += 1" in out and "allocate" not in out
    assert "line by line" in desk.run("diff", "A1.1")[1]


def test_reset_keeps_what_was_written(desk):
    for text in ("first", "second"):
        desk.write(text)
        assert desk.run("reset", "A1")[0] == 0
    assert desk.file.read_text() == LAB.starter()
    assert {path.read_text() for path in desk.folder.glob("*.backup-*.py")} == {"first", "second"}


def test_pack_makes_a_zip_with_the_file(desk):
    desk.write("mine")
    code, out, _ = desk.run("pack")
    with zipfile.ZipFile(out.strip()) as archive:
        assert code == 0 and archive.read("a1/allocator.py") == b"mine"


def test_watch_checks_again_when_the_file_has_changed(desk, monkeypatch):
    checked, third = [], threading.Event()

    def check(desk):
        checked.append(desk.file.read_text())
        return 0

    def sleep(_seconds):
        if len(checked) == 2 or third.is_set():
            raise KeyboardInterrupt
        if checked[-1] == "changed":
            third.set()
        desk.write("changed")

    monkeypatch.setattr(lab_commands, "_check", check)
    monkeypatch.setattr(lab_commands.time, "sleep", sleep)
    code, _, _ = desk.run("watch", "A1")
    assert code == 130 and checked == [LAB.starter(), "changed"]


def test_a_progress_file_that_is_none_says_so(desk):
    (desk.folder / "progress.json").write_text("[1")
    code, _, err = desk.run("check")
    assert code == 2 and "progress.json" in err


def test_verify_reports_what_is_wrong_with_a_lab(run, monkeypatch):
    monkeypatch.setattr(type(LAB), "hints", lambda self: {})
    monkeypatch.setattr("minipaged.labs.verify.check", lambda lab, file, tasks=None: [])
    monkeypatch.setattr(lab_commands, "verify", lambda lab: [("texts and hints", lab.key and "A1.1 has 0 hints")])
    code, out, _ = run("verify", "A1")
    assert code == 1 and "✗ texts and hints: A1.1 has 0 hints" in out
