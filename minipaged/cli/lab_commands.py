"""``minipaged lab``: start, check, watch, hint, replay, diff, reset, pack; and verify, for authors of labs."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.visualize_command import visualize
from minipaged.errors import InvalidRequest, MinipagedError
from minipaged.labs import catalogue, find
from minipaged.labs.checking import Result
from minipaged.labs.desk import Desk
from minipaged.labs.lab import LEVELS
from minipaged.labs.verify import verify

FAILED, NOT_IMPORTABLE, OVER_LIMIT, GRADER_BUG = 1, 3, 4, 70  # 2 is a usage error, as everywhere
SHOWN_STEPS = 30  # of a failing trace
MARKS = {"pass": "✓", "fail": "✗", "blocked": "·", "limit": "✗", "import": "✗", "skip": "-"}

app = typer.Typer(help="Write parts of the engine yourself.", no_args_is_help=True)
Key = Annotated[str, typer.Argument(help="A lab, e.g. A1.")]
Keys = Annotated[list[str] | None, typer.Argument(help="Labs, e.g. A1. Default: all that were started here.")]
Folder = Annotated[Path, typer.Option("--dir", help="The folder that holds your labs.")]
HERE = Path()


@app.command("list")
def list_(folder: Folder = HERE) -> None:
    """List the labs with your points."""
    for lab in catalogue():
        desk = Desk(lab, folder.resolve())
        done = "not started"
        if desk.started:
            done = f"{sum(desk.progress().passed.values())} of {lab.points} points"
        print(f"{lab.key}  {lab.title:32} {lab.minutes:4} min  {lab.points:3} points   {done}")
    print("\nminipaged lab start A1")


@app.command()
def start(key: Key, folder: Folder = HERE) -> None:
    """Create a folder with a lab's starter code and its instructions."""
    desk = Desk(find(key), folder.resolve())
    desk.start()
    print(f"{desk.folder / 'README.md'} says what to do; you write {desk.file}.")
    print(f"minipaged lab watch {desk.lab.key}   checks it whenever you save it")


@app.command()
def check(keys: Keys = None, folder: Folder = HERE) -> None:
    """Check your code. Exit codes: 0 all passed, 1 some failed, 3 import error, 4 time or memory limit."""
    raise typer.Exit(max(_check(desk) for desk in _desks(keys, folder)))


@app.command()
def watch(keys: Keys = None, folder: Folder = HERE, every: Annotated[float, typer.Option(hidden=True)] = 0.5) -> None:
    """Check your code now and at every change, until Ctrl-C."""
    desks = _desks(keys, folder)
    seen: dict[Path, int] = {}
    while True:
        for desk in desks:
            changed = _changed(desk.file)
            if changed and seen.get(desk.file) != changed:
                seen[desk.file] = changed
                _check(desk)
                print("\nwaiting for changes; Ctrl-C ends this", flush=True)
        time.sleep(every)


@app.command()
def hint(task: Annotated[str, typer.Argument(help="A task, e.g. A1.2.")], folder: Folder = HERE) -> None:
    """Show the next of a task's three hints."""
    desk, key = _task(task, folder)
    level, text = desk.hint(key)
    print(f"Hint {level} of {LEVELS} for {key}\n\n{text}")


@app.command()
def replay(
    key: Key,
    folder: Folder = HERE,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Watch the last failure in the visualizer, step by step."""
    desk = Desk(find(key), folder.resolve()).require()
    if not desk.recording.exists():
        why = "the last check left no events to show" if desk.progress().checks else "run 'minipaged lab check' first"
        raise InvalidRequest(f"no failure of {desk.lab.key} has been recorded; {why}")
    visualize(replay=desk.recording, port=port, open_browser=open_browser)


@app.command()
def diff(
    what: Annotated[str, typer.Argument(help="A task or a lab, e.g. A1.2.")],
    give_up: Annotated[bool, typer.Option("--give-up", help="Show tasks that have not passed, too.")] = False,
    folder: Folder = HERE,
) -> None:
    """Compare your code with the reference, once it passes."""
    if "." in what:
        desk, key = _task(what, folder)
        print(desk.diff(key, give_up))
        return
    desk = Desk(find(what), folder.resolve()).require()
    for task in desk.lab.tasks:
        if task.key in desk.progress().passed or give_up:
            print(f"# {task.key} {task.title}\n{desk.diff(task.key, give_up)}\n")
        else:
            print(f"# {task.key} {task.title}: shown when it passes\n")


@app.command()
def reset(key: Key, folder: Folder = HERE) -> None:
    """Start a lab again; your old file is kept beside the new one."""
    desk = Desk(find(key), folder.resolve())
    print(f"{desk.file} is the starter again; your old code is in {desk.reset()}")


@app.command()
def pack(keys: Keys = None, folder: Folder = HERE) -> None:
    """Make a ZIP to hand in, one for each lab."""
    for desk in _desks(keys, folder):
        print(desk.pack())


@app.command("verify")
def verify_(keys: Keys = None) -> None:
    """For authors: check that starters fail, references pass, checks find every planted bug, and hints exist."""
    wrong = 0
    for lab in [find(key) for key in keys] if keys else catalogue():
        started = time.monotonic()
        for what, problem in verify(lab):
            wrong += bool(problem)
            print(f"{lab.key} {'✗' if problem else '✓'} {what}{f': {problem}' if problem else ''}", flush=True)
        print(f"{lab.key} took {time.monotonic() - started:.1f} s", flush=True)
    raise typer.Exit(FAILED if wrong else 0)


def _desks(keys: list[str] | None, folder: Path) -> list[Desk]:
    folder = folder.resolve()
    if keys:
        return [Desk(find(key), folder).require() for key in keys]
    desks = [desk for desk in (Desk(lab, folder) for lab in catalogue()) if desk.started]
    if not desks:
        raise InvalidRequest(f"no lab has been started in {folder}; start one: minipaged lab start A1")
    return desks


def _task(task: str, folder: Path) -> tuple[Desk, str]:
    lab = find(task.partition(".")[0])
    keys = [one.key for one in lab.tasks]
    if task.upper() not in keys:
        raise InvalidRequest(f"there is no task {task!r}; lab {lab.key} has {', '.join(keys)}")
    return Desk(lab, folder.resolve()).require(), task.upper()


def _changed(file: Path) -> int:
    """The file's modification time in ns; 0 if it is missing, for example while an editor replaces it."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _check(desk: Desk) -> int:
    """Checks one lab, prints the results, and returns the exit code."""
    lab = desk.lab
    print(f"{lab.key} {lab.title}")
    first_time = not desk.progress().checks
    try:
        results = desk.check(_tell)
    except MinipagedError:
        raise
    except Exception:
        traceback.print_exc()
        print("This is a bug in the checks, not yours. Please report it with the lines above.", file=sys.stderr)
        return GRADER_BUG
    points = sum(result.points for result in results)
    print(f"{points} of {lab.points} points")
    first = next((result for result in results if result.status not in ("pass", "skip")), None)
    if first is None:
        print(f"All passed. Compare with ours: minipaged lab diff {lab.key}")
        return 0
    if first_time and not points:
        print("Red is expected at first. Do one task after the other.")
    if desk.recording.exists():
        print(f"watch it happen:  minipaged lab replay {lab.key}")
    print(f"stuck?            minipaged lab hint {first.task}")
    statuses = {result.status for result in results}
    return NOT_IMPORTABLE if "import" in statuses else OVER_LIMIT if "limit" in statuses else FAILED


def _tell(result: Result) -> None:
    points = f"{result.points} of {result.max_points}" if result.status != "skip" else "skipped"
    line = f"  {MARKS[result.status]} {result.task}  {result.title:28} {points:>8}   {result.cause}"
    print(line.rstrip(), flush=True)
    if result.trace:
        left_out = len(result.trace) - SHOWN_STEPS
        if left_out > 0:
            print(f"        … {left_out} steps before")
        for line in result.trace[-SHOWN_STEPS:]:
            print(f"        {line}")
    if result.output and result.status != "pass":
        print("      your file printed:")
        for line in result.output.rstrip().splitlines()[-10:]:
            print(f"      | {line}")
