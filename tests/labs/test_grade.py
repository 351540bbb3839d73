"""``minipaged grade``: a class with honest, invalid and cheating submissions, graded once, and the written results."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import stat
import sys
import xml.etree.ElementTree as xml
import zipfile
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from minipaged import cli
from minipaged.cli import grade_command
from minipaged.labs import checking, find
from minipaged.labs import grade as grading
from minipaged.labs.checking import Result
from minipaged.labs.class_page import causes, histogram
from minipaged.labs.desk import Desk
from minipaged.labs.submissions import MAX_ENTRIES, MAX_SOURCE, collect
from tests.labs.files import PACKAGE

LAB = find("A1")
REFERENCE = LAB.reference()
STARTER = LAB.starter().replace("from __future__ import annotations\n", "")  # so that it can follow other code
SECRET = "a secret of the teacher's, long enough"
XSS = "<script>alert(1)</script>"


def run(*args: str) -> tuple[int, str, str]:
    """Runs ``minipaged grade`` in this process → (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["minipaged", "grade", *map(str, args)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
    return leaving.value.code, out.getvalue(), err.getvalue()


def results(out, student: str) -> dict:
    return json.loads((out / "students" / student / "results.json").read_text())


def points(out, student: str) -> int:
    return sum(test["score"] for test in results(out, student)["tests"])


# --- cheats: each tries an attack, and then behaves like the starter or worse --------------------------------------

INSTEAD = "        return block"  # the last line of allocate()
CHEATS = {
    "leaves with success": REFERENCE.replace(INSTEAD, "        import os; os._exit(0)"),
    "patches comparisons": f"""
import builtins, operator, sys, types, unittest
testing = types.ModuleType("torch.testing")
testing.assert_close = lambda *args, **kwargs: None
sys.modules["torch.testing"] = testing
operator.eq = operator.ne = builtins.sorted = lambda *args, **kwargs: True
unittest.TestCase.assertEqual = lambda *args: None
builtins.AssertionError = builtins.NotImplementedError = KeyboardInterrupt
for attempt in ("int.__eq__ = lambda *a: True", "import gc; gc.get_referents(int.__dict__)[0]['__eq__'] = None"):
    try: exec(attempt)
    except (TypeError, PermissionError) as error: print("refused:", error)
builtins.isinstance = lambda thing, kinds, really=isinstance: really(thing, kinds) or kinds is AssertionError
{STARTER}""",
    "is always equal": REFERENCE.replace(
        INSTEAD,
        """        return Yes(0)

class Yes(int):
    __eq__ = __ge__ = lambda *args: True
    __ne__ = lambda *args: False
""",
    ),
    "reads frames": REFERENCE.replace(
        INSTEAD,
        """        import sys
        frame, seen = sys._getframe(), []
        while frame:
            seen += [str(value) for value in {**frame.f_globals, **frame.f_locals}.values()]
            frame = frame.f_back
        print("grader here" if any("ShadowPool" in text or "Trial" in text for text in seen) else "nobody here")
        import gc; return gc.get_objects()""",
    ),
    "forges answers": f"""
import json, os, struct
for fd in range(3, 4096):
    try:
        for _ in range(40): os.write(fd, struct.pack(">II", 9, 0) + b'{{"ok": 1}}'[:9].ljust(9))
    except OSError: pass
{STARTER}""",
    "forges an error": """
import os, struct
for fd in range(3, 4096):
    try: os.write(fd, struct.pack(">II", 12, 0) + b'{"error": 5}')
    except OSError: pass
""",
    "forges a tensor": """
import os, struct
text = b'{"ok": {"$tensor": "float32", "shape": [2], "at": 0}}'
for fd in range(3, 4096):
    try: os.write(fd, struct.pack(">II", len(text), 8) + text + bytes(8))
    except OSError: pass
""",
    "kills the grader": f"""
import os, signal
for attempt in (lambda: os.kill(os.getppid(), 9), lambda: os.killpg(os.getpgid(os.getppid()), 9),
                lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)):
    try: attempt(); print("killed")
    except (OSError, AttributeError) as error: print("refused:", error)
{STARTER}""",
    "breeds": f"""
import os, threading
for attempt in 20 * (os.fork, lambda: os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 60"], {{}}),
                     lambda: __import__("subprocess").Popen(["sleep", "60"])):
    try: attempt(); print("born")
    except OSError as error: print("refused:", error)
{STARTER}""",
    "hoards": REFERENCE.replace(INSTEAD, "        return len(bytearray(10 << 30))"),
    "shouts": REFERENCE.replace(INSTEAD, "        while True: print('x' * 10_000)"),
    "writes outside": f"""
import os
for attempt in (lambda: open("../escaped", "w"), lambda: open("OUT/escaped", "w"), lambda: os.mkdir("OUT/escaped"),
                lambda: os.mkfifo("OUT/escaped"), lambda: os.replace(__file__, "OUT/escaped"),
                lambda: __import__("sqlite3").connect("OUT/escaped")):
    try: attempt(); print("written")
    except (OSError, ImportError) as error: print("refused:", error)
{STARTER}""",
    "reads secrets": f"""
import os
paths = ["SECRET", "SUBMISSIONS/honest.py", "OUT/students/honest/results.json", "/etc/passwd", "/proc/self/environ"]
paths += [f"/proc/{{os.getppid()}}/{{name}}" for name in ("environ", "cmdline", "mem", "root/SECRET", "cwd/secret")]
for attempt in [lambda path=path: open(path).read() for path in paths] + [lambda: os.listdir("SUBMISSIONS")]:
    try: print("read", attempt())
    except OSError as error: print("refused")
{STARTER}""",
    "takes the engine": f"""
import importlib.util, runpy, zipimport
path = {str(PACKAGE / "memory" / "pool.py")!r}
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
for attempt in (lambda: load("mine", path), lambda: runpy.run_path(path), lambda: zipimport.zipimporter(path),
                lambda: load("mine", importlib.util.cache_from_source(path)), lambda: __import__("minipaged")):
    try: attempt(); print("taken")
    except (OSError, ImportError): print("refused")
{STARTER}""",
}
# The cause that a student's row must give, and how often "refused" occurs in the file's output.
CAUSES = {
    "leaves with success": ("ended its process (with exit code 0)", 0),
    "patches comparisons": ("num_free raised KeyboardInterrupt", 2),
    "is always equal": ("a Yes cannot be handed over", 0),
    "reads frames": ("gc.get_objects is not allowed", 0),
    "forges answers": ("allocate() returned 1, but blocks are numbered 0 to 0", 0),
    "forges an error": ("no answer", 0),
    "forges a tensor": ("a tensor cannot be handed over", 0),
    "kills the grader": ("not written yet", 3),
    "breeds": ("not written yet", 60),
    "hoards": ("ran out of memory", 0),
    "shouts": ("printed or wrote more than a megabyte", 0),
    "writes outside": ("not written yet", 6),
    "reads secrets": ("not written yet", 11),
    "takes the engine": ("not written yet", 5),
}


def zipped(path, *entries: tuple[str, bytes], mode: int = 0) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def hand_in(folder, elsewhere) -> dict[str, str]:
    """Writes submissions that cannot be graded. Returns student → cause."""
    elsewhere.write_text(REFERENCE)
    good = REFERENCE.encode()
    (folder / "link.py").symlink_to(elsewhere)
    (folder / "link inside").mkdir()
    (folder / "link inside" / LAB.file).symlink_to(elsewhere)
    (folder / "link to a folder").symlink_to(elsewhere.parent)
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("later")
    (folder / "binary.py").write_bytes(b"\x7fELF\x02\x00")
    (folder / "latin.py").write_bytes(b"x = '\xe9'")
    (folder / "huge.py").write_bytes(b"#" * (MAX_SOURCE + 1))
    (folder / "twice.py").write_bytes(good)
    zipped(folder / "twice.zip", (LAB.file, good))
    zipped(folder / "bomb.zip", (f"a1/{LAB.file}", b" " * (20 << 20)))
    zipped(folder / "climbs.zip", (LAB.file, good), ("../../x.py", good))
    zipped(folder / "absolute.zip", (LAB.file, good), ("/tmp/x.py", good))
    zipped(folder / "windows.zip", (LAB.file, good), ("C:\\x.py", good))
    zipped(folder / "linked.zip", (LAB.file, str(elsewhere).encode()), mode=stat.S_IFLNK | 0o777)
    zipped(folder / "many.zip", *((f"{number}.py", b"") for number in range(MAX_ENTRIES + 1)))
    zipped(folder / "ambiguous.zip", (f"a/{LAB.file}", good), (f"b/{LAB.file}", good))
    (folder / "torn.zip").write_bytes((folder / "linked.zip").read_bytes()[:-30])
    os.mkfifo(folder / "pipe.py")
    return {
        "link": "symbolic link", "link inside": "symbolic link", "link to a folder": "symbolic link",
        "empty": f"no {LAB.file}", "notes.txt": "neither a folder", "binary": "binary", "latin": "UTF-8",
        "huge": "more than 1 MB", "twice": "2 submissions: twice.py, twice.zip", "bomb": "more than 1 MB",
        "climbs": "outside of its folder", "absolute": "outside of its folder", "windows": "outside of its folder",
        "linked": "symbolic link", "many": "more than 1000 files", "ambiguous": "2 files", "torn": "cannot be read",
        "pipe": "no ordinary file",
    }  # fmt: skip


@pytest.fixture(scope="module")
def classroom(tmp_path_factory):
    """Honest, invalid and cheating submissions, graded in one batch."""
    root = tmp_path_factory.mktemp("class")
    folder, out, secret = root / "handed-in", root / "out", root / "secret"
    folder.mkdir()
    secret.write_text(SECRET)
    problems = hand_in(folder, root / "elsewhere.py")
    (folder / "honest.py").write_text(REFERENCE)
    desk = Desk(LAB, root / "home")
    desk.start()
    desk.file.write_text(LAB.mutants[0].applied(REFERENCE))
    (folder / "packed").mkdir()
    desk.pack().rename(folder / "packed" / "a1 (2).zip")
    bad = REFERENCE.replace(INSTEAD, f"        print('{XSS}'); raise KeyError('{XSS}\\x1b]0;\\x00')")
    (folder / f"=cmd()|{XSS[:8]}.py").write_text(bad)
    for name, source in CHEATS.items():
        for word, path in {"SECRET": secret, "SUBMISSIONS": folder, "OUT": out}.items():
            source = source.replace(word, str(path))
        (folder / f"{name}.py").write_text(source)
    code, said, err = run(folder, "-a", "a1", "--secret-file", secret, "-o", out, "--jobs", 2, "--format", "csv",
                          "--format", "junit")  # fmt: skip
    return SimpleNamespace(folder=folder, out=out, secret=secret, problems=problems, code=code, said=said, err=err)


def test_a_class_is_graded_to_the_end_whatever_is_handed_in(classroom):
    assert classroom.code == 0 and not classroom.err
    students = {path.name for path in (classroom.out / "students").iterdir()}
    assert students == {item.student for item in collect(classroom.folder, LAB.file)}
    assert len(students) == len(CHEATS) + len(classroom.problems) + 3
    assert all(results(classroom.out, student)["extra_data"]["finished"] for student in students)
    assert "\x1b" not in classroom.said and "honest                10 of 10\n" in classroom.said


def test_honest_work_gets_its_points(classroom):
    assert points(classroom.out, "honest") == 10
    packed = results(classroom.out, "packed")
    assert [test["score"] for test in packed["tests"]] == [2, 0, 0, 0], "a1 (2).zip in a folder is accepted"
    first, second, third, _ = packed["tests"]
    assert (first["number"], first["max_score"], first["output"]) == ("1.1", 2, "passed")
    assert second["name"] == "A1.2 Count references" and second["visibility"] == "visible"
    assert second["output"].splitlines()[:2] == [
        "after decref(0), num_free is 2 instead of 1", "    allocate() → 0",
    ]  # fmt: skip
    assert third["output"] == "blocked by A1.2"


def test_what_cannot_be_used_gets_a_row_with_the_cause(classroom):
    for student, cause in classroom.problems.items():
        row = results(classroom.out, student)
        assert cause in row["extra_data"]["problem"] and points(classroom.out, student) == 0
        assert all(cause in test["output"] for test in row["tests"]), student


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_gets_no_points(classroom, cheat):
    cause, refusals = CAUSES[cheat]
    output = results(classroom.out, cheat)["tests"][0]["output"]
    assert points(classroom.out, cheat) == 0
    assert cause in output
    assert output.count("refused") == refusals
    for word in ("killed", "born", "written\n", "taken", "grader here", SECRET, "popleft"):
        assert word not in output
    escaped = [folder / "escaped" for folder in (classroom.out, classroom.folder, classroom.out.parent)]
    assert not any(map(os.path.lexists, escaped))


def test_the_csv_has_a_line_for_each_and_no_formula(classroom):
    header, *lines = csv.reader((classroom.out / "grades.csv").read_text().splitlines())
    assert header == ["student", "points", "of", "A1.1", "A1.2", "A1.3", "A1.4", "cause"]
    by_name = {line[0]: line for line in lines}
    assert by_name["packed"] == ["packed", "2", "10", "2", "0", "0", "0", "after decref(0), num_free is 2 instead of 1"]
    assert len(lines) == len(by_name) == len(CHEATS) + len(classroom.problems) + 3
    assert not any(cell.startswith("=") for line in lines for cell in line)


def test_the_junit_file_is_xml_with_all_cases(classroom):
    suites = {suite.get("name"): suite for suite in xml.parse(classroom.out / "junit.xml").getroot()}
    kinds = [case[0].tag if len(case) else "passed" for case in suites["packed"]]
    assert kinds == ["passed", "failure", "skipped", "skipped"]
    assert "    incref(0)" in suites["packed"][1][0].text
    assert not suites["honest"].findall("testcase/failure")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {"src", "href", "onclick", "onload"} & {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_the_class_and_runs_nothing_that_students_wrote(classroom):
    page = (classroom.out / "report.html").read_text()
    tags = Tags(page)
    assert not {"script", "img", "link", "iframe"} & set(tags.tags) and XSS not in page
    assert f"raised KeyError: '{XSS}" in tags.text and "default-src 'none'" in page
    number = len(CHEATS) + len(classroom.problems) + 3
    assert f"{number} submissions" in tags.text and "all points: 1" in tags.text
    assert "num_free is not written yet" in tags.text


def test_a_second_run_keeps_who_is_done(classroom, monkeypatch):
    monkeypatch.setattr(grading, "check", lambda *args, **kwargs: pytest.fail("graded again"))
    before = results(classroom.out, "honest")
    code, said, _ = run(classroom.folder, "-a", "A1", "--secret-file", classroom.secret, "-o", classroom.out)
    assert code == 0 and "honest                10 of 10\n" in said and results(classroom.out, "honest") == before


# --- a small class: time, crashes and resumption ------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """``small(ann=source, …)`` writes submissions → the arguments of the command."""
    folder, secret = tmp_path / "handed-in", tmp_path / "secret"
    folder.mkdir()
    secret.write_text(SECRET)

    def hand_in(**sources: str) -> list:
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(source)
        return [folder, "-a", "A1", "--secret-file", secret, "-o", tmp_path / "out"]

    hand_in.out, hand_in.secret, hand_in.folder = tmp_path / "out", secret, folder
    return hand_in


def test_who_never_answers_is_stopped(small, monkeypatch):
    monkeypatch.setattr(checking, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(checking, "TIMES_REFERENCE", 0)
    monkeypatch.setattr("minipaged.labs.student.PATIENCE", 1)
    mute = "import os, time\nos.closerange(3, 4096)\ntime.sleep(600)"
    loop = REFERENCE.replace(INSTEAD, "        while True: pass")
    deaf = "import signal\nfor n in (2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    code, _, _ = run(*small(mute=mute, loop=loop, deaf=deaf), "--jobs", 3)
    assert code == 0
    for student in ("mute", "loop", "deaf"):
        assert results(small.out, student)["extra_data"]["results"][0]["status"] == "limit", student


def fake_check(asked, fail=lambda student, result: None):
    """A stand-in for `checking.check` that gives all points without starting a process."""

    def check(lab, file, *, secret, student, told):
        asked.append((student, file.read_text()))
        for task in lab.tasks:
            result = Result(task.key, task.title, task.points, task.points, "pass")
            told(result)
            fail(student, result)

    return check


def test_results_are_on_disk_after_each_test_and_a_bug_of_the_grader_stops_nobody_else(small, monkeypatch):
    seen, asked = [], []

    def fail(student, result):
        seen.append([test["score"] for test in results(small.out, student)["tests"]])
        if student == "ann" and result.task == "A1.2":
            raise ZeroDivisionError("a bug of the checks")

    monkeypatch.setattr(grading, "check", fake_check(asked, fail))
    code, said, _ = run(*small(ann="a", bob="b"), "--jobs", 1, "--format", "junit")
    assert seen == [[2, 0, 0, 0], [2, 3, 0, 0], [2, 0, 0, 0], [2, 3, 0, 0], [2, 3, 3, 0], [2, 3, 3, 2]]
    assert code == 70 and "ZeroDivisionError" in said and points(small.out, "bob") == 10
    ann = results(small.out, "ann")
    assert points(small.out, "ann") == 5 and "the grader failed" in ann["tests"][2]["output"]
    assert len(xml.parse(small.out / "junit.xml").getroot().findall("testsuite/testcase/error")) == 2
    monkeypatch.setattr(grading, "check", fake_check(asked))
    assert run(*small())[0] == 0
    assert [student for student, _ in asked] == ["ann", "bob", "ann"] and points(small.out, "ann") == 10


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(small, monkeypatch):
    asked = []

    def fail(student, result):
        if student == "bob":
            raise KeyboardInterrupt

    monkeypatch.setattr(grading, "check", fake_check(asked, fail))
    assert run(*small(ann="a", bob="b", eve="e"), "--jobs", 1)[0] == 130
    assert points(small.out, "ann") == 10 and points(small.out, "bob") == 2 and not (small.out / "report.html").exists()
    assert "the grader was stopped" in results(small.out, "bob")["tests"][1]["output"]
    monkeypatch.setattr(grading, "check", fake_check(asked))
    assert run(*small())[0] == 0
    students = [student for student, _ in asked]
    assert students.count("ann") == 1 and students.count("bob") == 2 and points(small.out, "eve") == 10


def test_graded_again_is_what_has_changed_or_all_if_asked_to(small, monkeypatch):
    asked = []
    monkeypatch.setattr(grading, "check", fake_check(asked))
    run(*small(ann="a", bob="b"))
    run(*small(bob="better"))
    assert sorted(asked) == [("ann", "a"), ("bob", "b"), ("bob", "better")]
    run(*small(), "--again")
    assert len(asked) == 5
    small.secret.write_text("another secret of the teacher's")
    run(*small())
    assert len(asked) == 7, "another secret gives other tests"
    (small.out / "students" / "ann" / "results.json").write_text('{"extra_data": [')
    run(*small())
    assert len(asked) == 8, "a broken result file"


def test_seeds_are_the_students_own(small, monkeypatch):
    seeds = {}

    def note(lab, task, file, seed, shrink):
        seeds.setdefault(file.parent.name, []).append(seed)
        return Result(task.key, "", 1, 1, "pass")

    monkeypatch.setattr(checking, "_check_task", note)
    run(*small(ann="a", bob="a"), "--jobs", 1)
    secret = SECRET.encode()
    assert seeds["0"] == [checking.seed_of(secret, "ann", "A1", task.key) for task in LAB.tasks]
    assert seeds["1"][0] == checking.seed_of(secret, "bob", "A1", "A1.1") != seeds["0"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda args: ["nowhere", *args[1:]], "no folder"),
        (lambda args: [args[0], "-a", "B7", *args[3:]], "there is no lab 'B7'"),
        (lambda args: [*args, "--secret-file", "nowhere"], "there is no secret"),
        (lambda args: [*args, "--secret-file", os.devnull], "less than 16 characters"),
        (lambda args: [*args, "-o", args[0] / "out"], "must not lie among the submissions"),
        (lambda args: [*args, "-o", args[4] / "out"], "cannot be written"),
        (lambda args: [*args, "--format", "pdf"], "pdf"),
        (lambda args: [*args, "--jobs", "0"], "--jobs"),
    ],
)
def test_a_wrong_command_ends_with_2_and_says_why(small, change, said):
    code, _, err = run(*change(small(ann="a")))
    assert code == 2 and said in err


def test_no_submissions_and_a_lab_that_cannot_be_done_here_are_said_at_once(small, monkeypatch):
    code, _, err = run(*small())
    assert code == 2 and "no submissions" in err
    monkeypatch.setattr(grade_command, "find", lambda key: SimpleNamespace(key=key, needs=lambda: "Triton needs Linux"))
    code, _, err = run(*small(ann="a"))
    assert code == 2 and "Triton needs Linux" in err


def test_the_histogram_counts_everybody_and_has_few_bars():
    assert histogram([0, 3, 3, 10], 10) == [(str(n), {0: 1, 3: 2, 10: 1}.get(n, 0)) for n in range(11)]
    bars = histogram([0, 9, 10, 100], 100)
    assert bars[0] == ("0–9", 2) and bars[1] == ("10–19", 1) and bars[-1] == ("100", 1) and len(bars) == 11


def test_causes_that_differ_in_numbers_count_as_one():
    rows = [
        grading.Row(name, "", [Result("A1.1", "", 0, 2, status, cause), Result("A1.2", "", 0, 3, "blocked", "blocked")])
        for name, status, cause in (("a", "fail", "got 3"), ("b", "fail", "got -12"), ("c", "limit", "slow"))
    ]
    assert causes(rows) == [("got 3", ["a", "b"]), ("slow", ["c"])]
