"""What README and the other documents tell a reader to type works, and prints what they say that it prints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer

from minipaged.cli import app
from tests.documents import DOCUMENTS, ROOT, Command, blocks, commands, named_in_sentences

IN_BLOCKS = [command for document in DOCUMENTS for block in blocks(document) for command in commands(block)]
ALL = IN_BLOCKS + [command for document in DOCUMENTS for command in named_in_sentences(document)]
PYTHON = [block.text for block in blocks("README.md") if block.language == "python"]
QUOTED = re.compile(r"^# → (.*)", re.M)

# Not run here, with the reason. What is not in this list is run as it is written.
NOT_RUN = {
    "make ": "make runs these tests, or needs another machine; their names are checked",
    "python3 -m venv": "make wheel-check does it",
    "pip ": "make wheel-check does it",
    "pytest": "these are the tests",
    "minipaged experiments run": "minutes; tests/experiments run the experiments",
    'python tutorials/question_sheets.py --student "$name"': "part of a loop; the line for one student is run",
    "minipaged grade class": "part of a script for Gradescope",
}
UNTIL_STOPPED = ("minipaged visualize", "minipaged serve", "minipaged lab watch", "minipaged lab replay")
NEED_A_SERVER = ("minipaged chat --url", "minipaged bench serve")
# A lab that has been started and not worked on: what fails, and with which code.
CODES = {"minipaged lab check A1": 1, "minipaged lab replay A1": 2, "minipaged visualize --lab A1": 2}
SECRETS = "secret", "secret.txt"


def test_the_documents_have_commands():
    assert len(IN_BLOCKS) > 50 and len(ALL) > len(IN_BLOCKS) + 20 and len(PYTHON) >= 4


def parser() -> Any:
    """The command line as it is, except that commands do nothing."""

    def silence(command: Any) -> None:
        command.callback = lambda **options: None
        for sub in getattr(command, "commands", {}).values():
            silence(sub)

    command = typer.main.get_command(app)
    silence(command)
    return command


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.place} {command.text[:50]}")
def test_each_command_exists_and_names_files_that_exist(command):
    program, *words = command.words
    if program == "torchrun":
        program, words = "minipaged", words[words.index("minipaged") + 1 :]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in words if "=" not in word} <= {*targets}
    elif program == "minipaged":
        try:
            parser().main(words, standalone_mode=False)
        except Exception as error:  # sentences may name a command without its arguments
            if type(error).__name__ != "MissingParameter" or ":" in command.place:
                raise
    elif program.startswith("python") and words[0] == "-m":
        assert find_spec(words[1])
    elif program.startswith("python") and words[0] != "-c":
        assert (ROOT / words[0]).is_file()
    elif program == "pip":
        assert "minipaged" not in command.text, "it is on no package index yet"
    if program in ("minipaged", "python"):
        written = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-o", "--out")]
        for word in words:
            if re.fullmatch(r"(examples|visualizer|tutorials|tests|benchmarks)/[\w./-]+", word) and word not in written:
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_a_document_is_python(document):
    for block in blocks(document):
        if block.language == "python":
            compile(dedent(block.text), block.place, "exec")


def quoted(code: str) -> list[str]:
    return QUOTED.findall(code)


def test_the_readmes_first_code_runs_and_prints_what_it_quotes():
    code = "\n".join(PYTHON[:2])
    assert quoted(PYTHON[0]), "the first answer that a reader sees"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for line in quoted(code):
        assert line in done.stdout
    for event in ("Allocated(seq_id=", "Admitted(", "StepFinished("):
        assert event in done.stdout, "events"


# --- as they are written: make test-all ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository, to make a mess in."""
    copy = tmp_path_factory.mktemp("clone") / "minipaged"
    left = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=left)
    for name in SECRETS:
        (copy / name).write_text("0123456789abcdef" * 4)
    return copy


def started(command: str, cwd: Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(cwd), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}" if command.startswith(UNTIL_STOPPED) else command],
        cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str) -> tuple[str, str]:
    """What a process printed, and what matched; empty if it ended before."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if found := re.search(pattern, line):
            return seen, found[0]
    return seen, ""


def run(command: Command, clone: Path) -> None:
    process = started(command.text, clone)
    expected = next((code for text, code in CODES.items() if command.text.startswith(text)), 0)
    if command.text.startswith(UNTIL_STOPPED) and not expected:
        seen, found = until(process, r"http://[\w.:]+|waiting for changes")
        assert found, f"{command}: {seen}"
        if found.startswith("http"):
            with urllib.request.urlopen(
                found.removesuffix("/v1") + ("/v1/models" if " serve" in command.text else "")
            ) as page:
                assert page.status == 200
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130), command
    else:
        printed, _ = process.communicate(timeout=280)
        assert process.returncode == expected, f"{command}: {process.returncode}\n{printed}"


RUN = [command for command in IN_BLOCKS if not command.text.startswith(tuple(NOT_RUN))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_command_works_as_it_is_written(clone):
    """In one test, because the commands use the default ports."""
    model = Path.home() / ".cache" / "minipaged" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for command in RUN:
        if "--ray" in command.text and find_spec("ray") is None or model.name in command.text and not model.exists():
            continue
        if "lab start" in command.text:
            shutil.rmtree(clone / "a1", ignore_errors=True)
        if not command.text.startswith(NEED_A_SERVER):
            run(command, clone)

    server = started("minipaged serve", clone)
    try:
        assert until(server, r"http://[\w.:]+")[1]
        for command in RUN:
            if command.text.startswith(NEED_A_SERVER):
                run(command, clone)
        (code,) = (block for block in PYTHON if "from openai" in block)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=clone)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == quoted(code)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
