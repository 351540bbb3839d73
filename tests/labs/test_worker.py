"""The process that runs a student's file: its answers are received, and forbidden actions are blocked."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from minipaged.errors import OutOfBlocks
from minipaged.labs import worker
from minipaged.labs.student import (
    LimitReached,
    Local,
    NotImportable,
    Remote,
    StudentError,
    Violation,
    expect,
)  # fmt: skip
from tests.labs.files import PACKAGE, student_of

ANSWERS = """
class Box:
    def __init__(self, value): self.value = value
    def get(self): return self.value
    def fail(self): raise KeyError("gone")
def echo(*args): return args
def ask(pool): return [pool.allocate(), pool.allocate(), pool.size]
def more(pool):
    try: pool.allocate()
    except OutOfBlocks as error: return str(error)
class OutOfBlocks(MemoryError): pass
def left(pool): return pool.secret
def nothing(): return object()
def leave(): import os; os._exit(0)
def quit(): raise SystemExit(0)
def spin():
    while True: pass
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    with student_of(tmp_path_factory.mktemp("answers"), ANSWERS, live=True) as student:
        yield student


def test_values_arrive_as_they_were_sent(student):
    box = student.new("Box", [1, None, "é", {"a": [True, -2.5]}])
    assert box.call("get") == box.get("value") == [1, None, "é", {"a": [True, -2.5]}]
    assert student.function("echo", 1, (2, 3)) == [1, [2, 3]]
    assert student.function("echo", float("inf"))[0] == float("inf")


def test_tensors_arrive_with_type_shape_and_bits():
    import torch  # takes seconds, and only this test needs it

    for tensor in (
        torch.randn(2, 3).t(), torch.randn(3).to(torch.bfloat16), torch.tensor(True), torch.empty(0, 4),
        torch.tensor([float("nan"), 1.0]).half(), torch.arange(4),
    ):  # fmt: skip
        frame = worker.pack({"x": [tensor]})
        text, raw = worker.sizes(frame[: worker.HEADER.size])
        body = frame[worker.HEADER.size :]
        (back,) = worker.unpack(body[:text], body[text : text + raw])["x"]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (back, tensor)]
        assert torch.equal(*bits)


@pytest.mark.parametrize(
    "text",
    [b"nothing", b"[" * 100_000, b'{"$tensor": "load", "shape": [], "at": 0}', b"NaN",
     b'{"$tensor": "float32", "shape": [-1], "at": 0}', b'{"$tensor": "float32", "shape": [9], "at": 0}'],
)  # fmt: skip
def test_what_is_no_answer_is_refused(text):
    with pytest.raises(worker.ProtocolError):
        worker.unpack(text, b"")


def test_a_students_exception_arrives_with_its_classes_and_line(student):
    box = student.new("Box", 1)
    with pytest.raises(StudentError, match="fail.. raised KeyError: 'gone'") as caught:
        box.call("fail")
    assert "LookupError" in caught.value.classes
    assert caught.value.where == "answer.py, line 5, in fail"
    expect(lambda: box.call("fail"), "LookupError", "fail()", "it is gone")
    with pytest.raises(Violation, match="get.. returned 1 instead of raising KeyError: why not"):
        expect(lambda: box.call("get"), "KeyError", "get()", "why not")


class Two:
    """A pool of two blocks."""

    size, secret = 2, "the answer"

    def __init__(self):
        self.left = [0, 1]

    def allocate(self):
        if not self.left:
            raise OutOfBlocks("none left")
        return self.left.pop(0)


def test_the_students_code_calls_an_object_of_the_graders(student):
    pool = Remote("pool", Two(), ("allocate",), ("size",))
    assert student.function("ask", pool) == [0, 1, 2]
    assert student.function("more", pool) == "none left", "the error has the student's class"
    with pytest.raises(StudentError, match="the pool has no 'secret'"):
        student.function("left", pool)


def test_a_violation_in_a_callback_ends_the_process_and_the_call(tmp_path):
    class Strict:
        def allocate(self):
            raise Violation("not now")

    with student_of(tmp_path, ANSWERS) as student:
        with pytest.raises(Violation, match="not now"):
            student.function("ask", Remote("pool", Strict(), ("allocate",)))
        assert not student.alive
        with pytest.raises(Violation, match="had ended before"):
            student.function("echo")


def test_an_answer_that_is_no_plain_data_is_a_failure_that_says_so(student):
    with pytest.raises(Violation, match="a object cannot be handed over"):
        student.function("nothing")


@pytest.mark.parametrize("source", ["x = (", "import nowhere", "raise SystemExit(0)", "1 / 0"])
def test_a_file_that_cannot_be_imported_says_why_and_where(tmp_path, source):
    with pytest.raises(NotImportable, match="answer.py, line 1"):
        student_of(tmp_path, source)


def test_leaving_is_no_answer(tmp_path):
    with student_of(tmp_path, ANSWERS) as student:
        with pytest.raises(StudentError, match="left with exit"):
            student.function("quit")
        with pytest.raises(Violation, match=r"leave\(\) ended its process \(with exit code 0\) instead of returning"):
            student.function("leave")


def test_a_process_that_sleeps_is_ended_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("minipaged.labs.student.PATIENCE", 2)
    with student_of(tmp_path, "import time\ndef doze(): time.sleep(1000)", seconds=1.0) as student:
        with pytest.raises(LimitReached):
            student.function("doze")


def test_a_process_that_did_not_get_the_processor_gets_more_time(tmp_path):
    """The process is stopped for longer than its limit, as on an overloaded machine."""
    with student_of(tmp_path, "def one(): return 1", seconds=1.0) as student:
        student._process.send_signal(signal.SIGSTOP)
        threading.Timer(1.3, student._process.send_signal, [signal.SIGCONT]).start()
        assert student.function("one") == 1


def test_a_process_that_asks_and_asks_is_ended(tmp_path):
    source = "def ask(pool):\n    while True: pool.size"
    with student_of(tmp_path, source, seconds=1.0) as student:
        with pytest.raises(LimitReached):
            student.function("ask", Remote("pool", Two(), (), ("size",)))


def test_an_endless_loop_is_ended_with_all_its_process_group(tmp_path):
    started = time.monotonic()
    with student_of(tmp_path, ANSWERS, seconds=1.0) as student:
        pid = student._process.pid
        with pytest.raises(LimitReached, match="1 seconds for this task were over"):
            student.function("spin")
    assert time.monotonic() - started < 60
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


CHEATS = {
    "import minipaged": "import minipaged",
    "import it by another door": "import importlib; importlib.import_module('minipaged.core.pool')",
    "without the blocker": (
        f"import sys; sys.meta_path.pop(0); sys.path.insert(0, {str(PACKAGE.parent)!r}); import minipaged"
    ),
    "without the blocker and under another name": (
        f"import sys; sys.meta_path.pop(0); sys.path.insert(0, {str(PACKAGE)!r}); import core.pool"
    ),
    "run its source": f"exec(open({str(PACKAGE / 'core' / 'pool.py')!r}).read())",
    "copy it": f"import shutil; shutil.copytree({str(PACKAGE)!r}, 'copy')",
    "link to it": f"import os; os.symlink({str(PACKAGE)!r}, 'engine')",
    "a detour": f"open({str(PACKAGE)!r} + '/core/../core/pool.py')",
    "through a file descriptor": f"import os; fd = os.open({str(PACKAGE)!r}, 0); os.open('errors.py', 0, dir_fd=fd)",
    "through /proc": f"open('/proc/self/root' + {str(PACKAGE / 'errors.py')!r})",
    "change the directory": f"import os; os.chdir({str(PACKAGE)!r}); open('errors.py')",
    "patch what the fence might use": (
        "import os, posix; os.stat = posix.stat = os.path.realpath = lambda *a, **k: posix.lstat('/dev/null')\n"
        f"open({str(PACKAGE / 'errors.py')!r})"
    ),
    "patch the builtins": (
        "import builtins as b; kept = b.type, b.isinstance, b.int\n"
        "b.type = lambda x: int; b.isinstance = lambda *a: True; b.int = str\n"
        f"try: open({str(PACKAGE / 'errors.py')!r})\n"
        "finally: b.type, b.isinstance, b.int = kept"
    ),
    "change the fence through its exception": (
        f"name = {str(PACKAGE / 'errors.py')!r}\n"
        "try: open(name)\n"
        "except PermissionError as error: frame = error.__traceback__.tb_next.tb_frame\n"
        "for key, value in (('secret', frozenset()), ('denied', frozenset()), ('packages', ())):\n"
        "    frame.f_locals[key] = value\n"
        "open(name)"
    ),
    "a name in bytes": f"open({str(PACKAGE / 'errors.py')!r}.encode())",
    "a folder of its own": "import os; os.mkdir('sub')",
    "another process": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import minipaged'])",
    "a shell": "import os; os.system('true')",
    "fork": "import os\nwhile True: os.fork()",
    "the network": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "write outside": "open('../escaped.txt', 'w').write('x')",
    "write outside, absolutely": "open('/tmp/minipaged-escaped.txt', 'w').write('x')",
    "append to its own shell": "import os; open(os.path.expanduser('~') + '/../.profile', 'a')",
    "remove files": "import os; os.remove('/tmp/minipaged-nothing')",
    "kill the grader": "import os; os.kill(os.getppid(), 9)",
    "the grader's environment": "import os; open(f'/proc/{os.getppid()}/environ')",
    "the grader's memory": "import os; open(f'/proc/{os.getppid()}/mem', 'rb')",
    "machine code": "import ctypes; ctypes.CDLL(None).getpid()",
    "find the fence": "import gc; gc.get_objects()",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_refused(tmp_path, cheat):
    with pytest.raises(NotImportable, match="PermissionError|ModuleNotFoundError|ImportError"):
        student_of(tmp_path, CHEATS[cheat])
    assert not Path("/tmp/minipaged-escaped.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"answer.py"}


def test_files_beside_the_students_cannot_be_read(tmp_path):
    """For example the secret and other students' submissions."""
    secret = tmp_path / "secret.txt"
    secret.write_text("hush")
    with student_of(tmp_path, f"def read(): return open({str(secret)!r}).read()") as student:
        with pytest.raises(StudentError, match="may not be opened here"):
            student.function("read")


def test_memory_is_limited(tmp_path):
    with pytest.raises(LimitReached, match="ran out of memory"):
        with student_of(tmp_path, "def hoard(): return len(bytearray(10 << 30))") as student:
            try:
                student.function("hoard")
            except StudentError as error:
                raise error.violation() from None


def test_what_it_prints_is_kept_up_to_a_limit(tmp_path):
    source = """
def speak(): print("hello from the file"); return 1
def shout():
    while True: print("x" * 10_000)
"""
    with student_of(tmp_path, source) as student:
        assert student.function("speak") == 1
        assert student.output() == "hello from the file\n"
        with pytest.raises(StudentError, match="printed or wrote more than a megabyte"):
            student.function("shout")
        output = student.output()
    assert output.startswith("hello") and len(output) < 5000 and "bytes more" in output
    assert student.output() == output, "the output does not change afterwards"


def test_it_may_write_to_its_own_folder_and_read_what_python_needs(tmp_path):
    source = """
import dataclasses, heapq, json, random, statistics, typing
with open("notes.txt", "w") as file: file.write("mine")
def read(): return open("notes.txt").read()
"""
    with student_of(tmp_path, source) as student:
        assert student.function("read") == "mine"


def test_its_surroundings_are_bare(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADER_SECRET", "hush")
    source = """
import os, sys
def look(): return [dict(os.environ), sys.argv, sys.path, os.getcwd()]
"""
    with student_of(tmp_path, source) as student:
        environment, argv, path, folder = student.function("look")
    assert "GRADER_SECRET" not in environment and len(argv) == 1
    assert not any("site-packages" in entry or entry == str(PACKAGE.parent) for entry in path)
    assert folder != str(tmp_path) and not os.path.exists(folder)


def test_the_engines_own_code_is_asked_in_the_same_way():
    class Box:
        size = 3

        def get(self, other):
            return (other, 2)

    local = Local({"Box": Box, "double": lambda x: 2 * x})
    box = local.new("Box")
    assert box.call("get", 1) == [1, 2] and box.get("size") == 3 and local.function("double", 4) == 8
    with pytest.raises(StudentError, match="KeyError"):
        local.new("Circle")
