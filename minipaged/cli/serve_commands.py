"""``minipaged serve`` and ``minipaged batch``: OpenAI's API over HTTP, and its batch files without HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minipaged.cli.options import (
    DEFAULT,
    Attention,
    Device,
    Dtype,
    Eviction,
    KvDtype,
    KvMemory,
    MaxModelLen,
    MaxNumSeqs,
    Memory,
    Model,
    NumBlocks,
    NumSpeculativeTokens,
    Speculate,
    fail,
    given,
    load,
    pool,
)
from minipaged.config import EngineConfig
from minipaged.models.sampling_defaults import describe

EXTRA = dict.fromkeys(("fastapi", "uvicorn", "starlette", "pydantic", "pydantic_core"), "fastapi uvicorn")
EXTRA |= dict.fromkeys(("ray", "pyarrow"), "'ray[data]'")  # module: what to install


def serve(
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    memory: Memory = None,
    eviction: Eviction = None,
    attention: Attention = None,
    kv_dtype: KvDtype = None,
    num_blocks: NumBlocks = None,
    kv_memory: KvMemory = None,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="The model's name in the API. Default: as --model.")] = "",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MINIPAGED_API_KEY", help="Clients must send it; repeatable.", show_envvar=True),
    ] = None,
    visualize: Annotated[bool, typer.Option("--visualize", help="Show this engine at /visualizer.")] = False,
    max_concurrent: Annotated[int, typer.Option(help="Most requests at once; beyond it 429.")] = 256,
    max_queue: Annotated[int, typer.Option(help="Most waiting sequences; beyond it 429.")] = 128,
    timeout: Annotated[float, typer.Option(help="Most seconds for a request.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds for running requests to finish when told to stop.")] = 10.0,
) -> None:
    """Serve OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics."""
    with extra():
        from minipaged.server.run import Server, bind
        from minipaged.server.service import Limits
    if any(not key for key in api_key or ()):
        raise typer.Exit(fail("an API key must not be empty"))
    sizes = pool(num_blocks, kv_memory, max_num_seqs, max_model_len)
    limits = Limits(max_concurrent=max_concurrent, max_queue=max_queue, timeout=timeout, grace=grace)
    sock = bind(host, port)
    settings = given(
        memory=memory, eviction=eviction, attention=attention, kv_dtype=kv_dtype, speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    )  # fmt: skip
    settings |= sizes
    llm = load(model, device=device, dtype=dtype, **settings)
    server = Server(llm, name=name, keys=api_key or (), host=host, limits=limits, visualize=visualize)
    if not api_key and not server.local:
        print("warning: the server accepts all clients that can reach this machine; --api-key requires a key")
    server.run(sockets=[sock])


def batch(
    prompts: Annotated[Path, typer.Argument(help="A file in OpenAI's batch format: one request per line.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The answers, one per line; continues this file.")],
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    memory: Memory = None,
    attention: Attention = None,
    kv_dtype: KvDtype = None,
    num_blocks: NumBlocks = None,
    kv_memory: KvMemory = None,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Use several workers: on the Ray cluster of this machine, or on a new one.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines, with --ray. Default: one per GPU or, without GPUs, per machine.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="fcfs, or batchllm: groups prompts by prefix, so that each prefix is computed once.")
    ] = "fcfs",
) -> None:
    """Answer a file of requests. After an interruption, the same command continues where it stopped."""
    with extra():
        from minipaged import offline_batch

        if ray:
            from minipaged import offline_batch_ray
    if workers and not ray:
        raise typer.Exit(fail("--workers is for --ray; without --ray there is one engine"))
    settings = given(
        memory=memory, attention=attention, kv_dtype=kv_dtype, speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    )  # fmt: skip
    settings |= pool(num_blocks, kv_memory, max_num_seqs, max_model_len)
    settings |= {"model": model, "device": device, "dtype": dtype}
    EngineConfig(**settings).check_schedule(schedule)  # before the slow start of a model or cluster
    todo = offline_batch.open_batch(prompts, out)
    if ray:
        answers = offline_batch_ray.answers(partial(load, **settings), todo, device, workers, schedule)
    else:
        llm = load(**settings)
        print(describe(llm.default_params, llm.generation_config, {}), file=sys.stderr)
        answers = offline_batch.answers(llm, todo, schedule)
    columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(todo))
        offline_batch.write(answers, out, lambda done: bar.update(task, completed=done))
    print(f"{len(todo)} requests answered, all in {out}")


@contextmanager
def extra() -> Iterator[None]:
    """Turns a missing extra into a message that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise typer.Exit(fail(f"this needs {error.name}: pip install {EXTRA[error.name]}")) from None
