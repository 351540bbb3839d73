"""The ``minipaged`` command: its entry point, doctor and kernels; the other commands have modules of their own.

torch, transformers and gradio take seconds to import, so each command imports what it needs when it runs, and
``--help`` stays quick. A model's text is printed as it is, never by rich, which reads ``[bold]`` as markup.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Annotated

import typer
from rich.console import Console

from minipaged import __version__
from minipaged.cli.bench_commands import app as bench
from minipaged.cli.chat_command import chat
from minipaged.cli.experiments_commands import app as experiments
from minipaged.cli.generate_command import generate
from minipaged.cli.grade_command import grade
from minipaged.cli.lab_commands import app as labs
from minipaged.cli.options import fail, torchrun
from minipaged.cli.serve_commands import batch, serve
from minipaged.cli.tutorials_command import tutorials
from minipaged.cli.visualize_command import visualize
from minipaged.errors import InvalidConfig, MinipagedError

app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(experiments, name="experiments")
app.add_typer(bench, name="bench")
app.command()(chat)
app.command()(serve)
app.command()(batch)
app.add_typer(labs, name="lab")
app.command()(grade)
app.command()(tutorials)
kernels = typer.Typer(help="Look into the Triton kernels.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")
app.command()(visualize)
app.command()(generate)


# Errors of the system that a write meets: a full disk, a quota, a closed pipe, a disk that fails or is read-only.
NO_BUGS = {errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO, errno.EROFS, errno.EFBIG}


def main() -> None:
    """Entry point. Exit codes: 0 success; 1 failure while running; 2 the user's mistake; 130 after Ctrl-C.

    With 1 and 2 one line says what is wrong. Of several processes that torchrun started, only rank 0 prints.
    """
    if torchrun() and os.environ["RANK"] != "0":
        # Other ranks exit with 0, or torchrun would kill rank 0 before it has printed its message. Only the traceback
        # of a bug is still raised.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), suppress(SystemExit):
            _main()
    else:
        _main()


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without emoji shows "?", not a traceback
            stream.reconfigure(errors="replace")
    if sys.stdout is None:
        sys.exit(fail("stdout is closed, so there is nowhere to print; redirect it to a file"))
    try:
        try:
            app(prog_name="minipaged")
        finally:
            sys.stdout.flush()
    except MinipagedError as error:
        # The user's mistakes are wrong values or a busy port; a failed step or broken bookkeeping is ours.
        fail(str(error))
        sys.exit(2 if isinstance(error, ValueError | OSError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in NO_BUGS:
            raise
        # What is left in the buffer would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # the reader wanted no more: `minipaged … | head`
            fail(f"the output cannot be written{f' to {error.filename}' if error.filename else ''}: {error.strerror}")
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """PagedAttention you can read in an afternoon, run on anything, and watch as it runs.

    Without a command, starts the visualizer.
    """
    if version:
        print(f"minipaged {__version__}")
        raise typer.Exit
    if torchrun() and context.invoked_subcommand != "generate":
        command = context.invoked_subcommand or "visualize"
        raise InvalidConfig(f"{command!r} runs in a single process; only 'generate' goes with torchrun")
    if context.invoked_subcommand is None:
        print("Starting the visualizer, as 'minipaged visualize' does; 'minipaged --help' lists the other commands.")
        visualize()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False) -> None:
    """Check what is installed and what this machine can do."""
    from minipaged.doctor import report, report_json

    raise typer.Exit(0 if (report_json() if as_json else report(Console(highlight=False))) else 1)


@kernels.command("report")
def kernels_report(
    only: Annotated[str, typer.Argument(help="Variants with this in their name, e.g. 'decode bf16'.")] = "",
    ptx: Annotated[bool, typer.Option("--ptx", help="Print NVIDIA's assembly language, too.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the GPU's machine code, too.")] = False,
) -> None:
    """Compile the Triton kernels for sm_80 and sm_90 and show their registers and spills; needs no GPU."""
    from minipaged.kernels.backend import require_compiler

    require_compiler()
    from minipaged.kernels import report

    chosen = [variant for variant in report.variants() if only in variant.name]
    if not chosen:
        raise typer.Exit(fail(f"no variant has {only!r} in its name; leave the name out to list all"))
    total = len(chosen) * len(report.TARGETS)
    print(
        f"{total} kernels at most, half a second each: {total / 120:.1f} minutes, less if they were compiled before\n"
    )
    print(report.LEGEND, report.HEADER, sep="\n\n", flush=True)
    for compiled in report.compile_all(chosen):
        print(report.line(compiled), flush=True)
        for code in (compiled.ptx if ptx else "", compiled.sass if sass else ""):
            print(code, end="")
