"""``minipaged visualize``: opens the visualizer on an engine, a recording, or a student's lab code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipaged.cli.options import (
    DEFAULT,
    Device,
    Dtype,
    Eviction,
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

if TYPE_CHECKING:
    from minipaged.llm import LLM


def visualize(
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    host: Annotated[str, typer.Option(help="0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    num_blocks: NumBlocks = None,
    kv_memory: KvMemory = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens computed in one step.")] = None,
    max_model_len: MaxModelLen = None,
    preemption: Annotated[str | None, typer.Option(help="When the pool is full: recompute or swap.")] = None,
    memory: Memory = None,
    eviction: Eviction = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    classroom: Annotated[
        bool, typer.Option("--classroom", help="Others may watch; only the printed address can control.")
    ] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="A public link, through Gradio's servers; it can only watch."),
    ] = False,
    replay: Annotated[Path | None, typer.Option(help="Show this recording; no model is loaded.")] = None,
    lab: Annotated[str | None, typer.Option("--lab", help="Run on your code for this lab, e.g. A1.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="A Python file with SETTINGS for the engine and a SCENARIO: see examples/.")
    ] = None,
) -> None:
    """Watch the engine's memory while it runs, in the browser."""
    from visualizer.scenarios import DEMO_SETTINGS

    if classroom and host == "127.0.0.1":
        host = "0.0.0.0"
    chosen = [name for name, value in (("--replay", replay), ("--lab", lab), ("--plugin", plugin)) if value is not None]
    if len(chosen) > 1:
        raise typer.Exit(fail(f"{' and '.join(chosen)} exclude each other; leave all out but one"))
    if replay is not None:
        launch = _visualizer()
        try:
            launch(host=host, port=port, open_browser=open_browser, replay=replay, share=share)
        except (ValueError, OSError) as error:
            raise typer.Exit(fail(str(error))) from None
        raise typer.Exit(130)

    plugged, scenario = _plugin(plugin)
    sizes = pool(num_blocks, kv_memory, max_num_seqs, max_model_len)
    settings = _resized(_resized(DEMO_SETTINGS, plugged), sizes) | given(
        device=device,
        dtype=dtype,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        preemption=preemption,
        memory=memory,
        eviction=eviction,
        speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    )
    if lab is not None:
        from minipaged.labs.live import settings_of

        settings |= settings_of(lab)
    EngineConfig(model=model, **settings)  # reject wrong settings before the slow imports
    launch = _visualizer()
    launch(
        lambda: load(model, **settings) if lab is None else _load_lab(lab, model, **settings),
        host=host, port=port, open_browser=open_browser, classroom=classroom, share=share,
        recordings_will_do=model == DEFAULT.model and lab is None, other_models=lab is None,
        **({"scenario": scenario} if scenario else {}),
    )  # fmt: skip
    raise typer.Exit(130)  # gradio returns only on Ctrl-C


def _plugin(path: Path | None) -> tuple[dict[str, Any], Any]:
    """The settings and the scenario of a plug-in; neither without one."""
    if path is None:
        return {}, None
    from visualizer.plugins import load_plugin

    return load_plugin(path)


def _resized(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes; if the changes give the pool's size, an earlier size no longer counts."""
    names = {"num_blocks", "kv_memory"}
    kept = {name: value for name, value in settings.items() if not (names & set(changes) and name in names)}
    return kept | changes


def _visualizer() -> Callable[..., Any]:
    try:
        from visualizer.app import launch
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("gradio", "plotly"):
            raise
        code = fail(f"the visualizer needs {package}: pip install 'gradio>=6.24,<7' plotly")
        raise typer.Exit(code) from None
    return launch


def _load_lab(lab: str, model: str, **settings: Any) -> LLM:
    from minipaged.labs.live import install

    llm = load(model, **settings)
    install(llm, lab)
    return llm
