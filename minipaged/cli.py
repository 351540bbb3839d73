"""The ``minipaged`` command: visualize, generate, doctor, kernels; the other commands have modules of their own.

torch, transformers and gradio take seconds to import, so each command imports what it needs when it runs, and
``--help`` stays quick. A model's text is printed as it is, never by rich, which reads ``[bold]`` as markup.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from minipaged import __version__, cli_bench, cli_chat, cli_serve
from minipaged.bench.cli import app as bench
from minipaged.cli_options import (
    DEFAULT,
    Attention,
    Device,
    Dtype,
    Eviction,
    KvDtype,
    MaxTokens,
    Memory,
    MinP,
    Model,
    NumSpeculativeTokens,
    Seed,
    Speculate,
    Stop,
    Temperature,
    TopK,
    TopP,
)  # fmt: skip
from minipaged.cli_options import fail as _fail
from minipaged.cli_options import given as _given
from minipaged.cli_options import load as _load
from minipaged.cli_options import sampling as _sampling
from minipaged.cli_options import torchrun as _torchrun
from minipaged.config import EngineConfig, SamplingParams
from minipaged.errors import InvalidConfig, MinipagedError
from minipaged.experiments.cli import app as experiments
from minipaged.labs.cli import app as labs
from minipaged.labs.grade import command as grade

if TYPE_CHECKING:
    from minipaged.llm import LLM
    from minipaged.outputs import Delta

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(experiments, name="experiments")
app.add_typer(bench, name="bench")
bench.command("serve")(cli_bench.serve)
app.command()(cli_chat.chat)
app.command()(cli_serve.serve)
app.command()(cli_serve.batch)
app.add_typer(labs, name="lab")
app.command("grade")(grade)
kernels = typer.Typer(help="Look into the Triton kernels.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")


def main() -> None:
    """Entry point. Exit codes: 0; 1 for what went wrong while running; 2 for what the user can mend; 130 after Ctrl-C.

    With 1 and 2 one line says what. Of several processes that torchrun started, the first one alone says anything.
    """
    if _torchrun() and os.environ["RANK"] != "0":
        # Nor does the exit code of another: torchrun would end the first one for it, in the midst of its message. Only
        # the traceback of a bug gets out of here.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), suppress(SystemExit):
            _main()
    else:
        _main()


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no emoji shows "?" rather than a traceback
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="minipaged")
    except MinipagedError as error:
        # Those that a user can cause are values or a port; a failed step or broken bookkeeping is nobody's typing.
        _fail(str(error))
        sys.exit(2 if isinstance(error, ValueError | OSError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


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
    if _torchrun() and context.invoked_subcommand != "generate":
        command = context.invoked_subcommand or "visualize"
        raise InvalidConfig(f"{command!r} is for a single process; of the commands only 'generate' goes with torchrun")
    if context.invoked_subcommand is None:
        visualize()


@app.command()
def visualize(
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks in the pool.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in the running batch at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens computed in one step.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens a sequence may reach.")] = None,
    preemption: Annotated[str | None, typer.Option(help="What a full pool does: recompute or swap.")] = None,
    memory: Memory = None,
    eviction: Eviction = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    classroom: Annotated[
        bool, typer.Option("--classroom", help="Others may watch; only who has the printed address controls.")
    ] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="A public link, through Gradio's servers. Whoever opens it may only watch."),
    ] = False,
    replay: Annotated[Path | None, typer.Option(help="Show this recording; no model is loaded.")] = None,
    lab: Annotated[str | None, typer.Option("--lab", help="Run on what you wrote for this lab, e.g. A1.")] = None,
) -> None:
    """Watch the engine's memory while it runs, in the browser."""
    from visualizer.scenarios import DEMO_SETTINGS

    if classroom and host == "127.0.0.1":
        host = "0.0.0.0"
    if replay is not None:
        launch = _visualizer()
        try:
            launch(host=host, port=port, open_browser=open_browser, replay=replay, share=share)
        except (ValueError, OSError) as error:
            raise typer.Exit(_fail(str(error))) from None
        raise typer.Exit(130)

    settings = DEMO_SETTINGS | _given(
        device=device,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        preemption=preemption,
        memory=memory,
        eviction=eviction,
        speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    )
    if lab is not None:
        from minipaged.labs.live import settings_of

        settings |= settings_of(lab)
    EngineConfig(model=model, **settings)  # complain before the slow imports, not after
    launch = _visualizer()
    launch(
        lambda: _load(model, **settings) if lab is None else _load_lab(lab, model, **settings),
        host=host, port=port, open_browser=open_browser, classroom=classroom, share=share,
        recordings_will_do=model == DEFAULT.model and lab is None, other_models=lab is None,
    )  # fmt: skip
    raise typer.Exit(130)  # gradio returns on Ctrl-C, and on nothing else


def _visualizer() -> Callable[..., Any]:
    try:
        from visualizer.app import launch
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "plotly"):
            raise
        code = _fail(f"the visualizer needs {error.name}: pip install 'gradio>=6.24,<7' plotly")
        raise typer.Exit(code) from None
    return launch


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    n: Annotated[int, typer.Option("-n", help="Continuations to sample; they share the prompt's blocks.")] = 1,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    seed: Seed = None,
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    memory: Memory = None,
    attention: Attention = None,
    kv_dtype: KvDtype = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a text. With torchrun, several processes share the model (tensor parallelism)."""
    params = _sampling(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        logprobs=0 if as_json else None,  # the sampled tokens' only, for cumulative_logprob
    )
    settings = _given(
        device=device, dtype=dtype, memory=memory, attention=attention, kv_dtype=kv_dtype, speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    )  # fmt: skip
    if _torchrun():
        from minipaged.execution.tensor_parallel import run

        run(lambda llm: _answer(llm, prompt, params, as_json), model, **settings)
    else:
        _answer(_load(model, **settings), prompt, params, as_json)


def _answer(llm: LLM, prompt: str, params: SamplingParams, as_json: bool) -> None:
    if params.n == 1 and not as_json:
        _print_stream(llm.stream(prompt, params))
        return
    outputs = llm.generate(prompt, params)[0].outputs
    if as_json:
        keys = ("index", "text", "token_ids", "finish_reason", "cumulative_logprob")
        samples = [{key: getattr(output, key) for key in keys} for output in outputs]
        answer = {"model": llm.engine.config.model, "prompt": prompt, "outputs": samples}
        print(json.dumps(answer, ensure_ascii=False))
        return
    console = Console()
    for output in outputs:
        console.rule(f"{output.index + 1} of {params.n}, finished by {output.finish_reason}")
        print(output.text)


@app.command()
def doctor() -> None:
    """Check what is installed and what this machine can do."""
    from minipaged.doctor import report

    raise typer.Exit(0 if report(Console(highlight=False)) else 1)


@kernels.command("report")
def kernels_report(
    only: Annotated[str, typer.Argument(help="Variants with this in their name, e.g. 'decode bf16'.")] = "",
    ptx: Annotated[bool, typer.Option("--ptx", help="Print NVIDIA's assembly language, too.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the GPU's machine code, too.")] = False,
) -> None:
    """Compile the Triton kernels for sm_80 and sm_90, and show what became of them: needs no GPU."""
    from minipaged.kernels.backend import require_compiler

    require_compiler()
    from minipaged.kernels import report

    chosen = [variant for variant in report.variants() if only in variant.name]
    if not chosen:
        raise typer.Exit(_fail(f"no variant has {only!r} in its name; without a name, all of them are listed"))
    print(report.LEGEND, report.HEADER, sep="\n\n", flush=True)
    for compiled in report.compile_all(chosen):
        print(report.line(compiled), flush=True)
        for code in (compiled.ptx if ptx else "", compiled.sass if sass else ""):
            print(code, end="")


def _print_stream(deltas: Iterator[Delta]) -> str:
    """Prints text as it comes and returns the whole of it."""
    pieces = []
    try:
        for delta in deltas:
            print(delta.text, end="", flush=True)
            pieces.append(delta.text)
    finally:
        print()  # also after Ctrl-C, for the shell's prompt
    return "".join(pieces)


def _load_lab(lab: str, model: str, **settings: Any) -> LLM:
    from minipaged.labs.live import install

    llm = _load(model, **settings)
    install(llm, lab)
    return llm
