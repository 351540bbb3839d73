"""``minipaged grade``: grades a class's submissions and prints a line for each."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from minipaged.errors import InvalidRequest
from minipaged.labs import find
from minipaged.labs import grade as grading
from minipaged.labs.class_page import page
from minipaged.labs.lab import Lab
from minipaged.labs.submissions import Submission, collect

GRADER_BUG = 70
MIN_SECRET = 16  # bytes
HALF_THE_CORES = max(1, (os.cpu_count() or 2) // 2)  # the other half runs the processes that compare


class Format(StrEnum):
    gradescope = "gradescope"
    csv = "csv"
    junit = "junit"


def grade(
    submissions: Annotated[Path, typer.Argument(help="A folder with a folder, ZIP or file for each student.")],
    lab_key: Annotated[str, typer.Option("--assignment", "-a", help="The lab, e.g. A1.")],
    secret_file: Annotated[Path, typer.Option(help="Seeds the hidden tests: same file, same tests.")],
    formats: Annotated[
        list[Format] | None, typer.Option("--format", help="csv: grades.csv. junit: junit.xml. Repeatable.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Submissions to grade at once.")] = HALF_THE_CORES,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="For the results. Default: grades/LAB.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Grade again what is already graded.")] = False,
) -> None:
    """Grade a class: a results.json for each student (Gradescope's format), and report.html for the teacher.

    Exit codes: 0 when the results are written, 2 for a wrong command, 70 for a bug in the grader.
    """
    lab = find(lab_key)
    if reason := lab.needs():
        raise InvalidRequest(f"lab {lab.key} cannot be graded here: {reason}")
    secret, out = _read_secret(secret_file), out or Path("grades", lab.key.lower())
    collected = _collected(submissions, lab, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = grading.grade(
            lab, collected, out, secret=secret, jobs=jobs, again=again, told=lambda row: _tell(lab, row)
        )
        if Format.csv in (formats or ()):
            grading.write_csv(lab, rows, out / "grades.csv")
        if Format.junit in (formats or ()):
            grading.write_junit(lab, rows, out / "junit.xml")
        report = out / "report.html"
        report.write_text(page(lab, rows), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"the results cannot be written: {error}") from error
    print(f"{len(rows)} submissions; {report} shows the class")
    raise typer.Exit(GRADER_BUG if any(row.bug for row in rows) else 0)


def _read_secret(path: Path) -> bytes:
    """Reads the secret. Raises `InvalidRequest` if it is missing, or so short that it could be guessed."""
    make = f"python -c 'import secrets; print(secrets.token_hex(32))' > {path}"
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise InvalidRequest(f"there is no secret in {path} ({error.strerror}); make one: {make}") from error
    if len(secret) < MIN_SECRET:
        raise InvalidRequest(f"the secret in {path} has less than {MIN_SECRET} characters; make one: {make}")
    return secret


def _collected(folder: Path, lab: Lab, out: Path) -> list[Submission]:
    if not folder.is_dir():
        raise InvalidRequest(f"there is no folder {folder}; give one that holds a folder, ZIP or file for each student")
    if out.resolve().is_relative_to(folder.resolve()):
        raise InvalidRequest("the results must not lie among the submissions; choose another --out")
    try:
        found = collect(folder, lab.file)
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be read: {error.strerror}") from error
    if not found:
        raise InvalidRequest(f"there are no submissions in {folder}")
    return found


def _tell(lab: Lab, row: grading.Row) -> None:
    text = f"{row.student:20} {row.points:3} of {lab.points}   {row.cause}".rstrip()
    # Students' text must not move the cursor or change colors.
    print("".join(c if c.isprintable() else "\ufffd" for c in text), flush=True)
    if row.bug:
        print(f"The grader failed; this is not the student's fault:\n{row.bug}", flush=True)
