"""Builds and serves the page: one `gr.HTML` component whose JavaScript pulls records of events and draws them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # noqa: E402
from fastapi import Response  # noqa: E402

from minipaged.config import CHOICES  # noqa: E402
from minipaged.errors import InvalidConfig, MinipagedError, PortInUse  # noqa: E402
from visualizer.charts import figures_as_json  # noqa: E402
from visualizer.classroom import Guard  # noqa: E402
from visualizer.commands import Commands  # noqa: E402
from visualizer.experiments import LOOKING, Experiments  # noqa: E402
from visualizer.experiments import menu as experiments_menu  # noqa: E402
from visualizer.export import PLOTLY  # noqa: E402
from visualizer.log import RecordLog  # noqa: E402
from visualizer.paced_loop import DEFAULT_RATE, PacedLoop  # noqa: E402
from visualizer.recordings import Recordings  # noqa: E402
from visualizer.scenarios import DEMO_SETTINGS, OPENING, Scenario, menu  # noqa: E402
from visualizer.sources import sources  # noqa: E402
from visualizer.styles import MONO, SANS, STATIC, served, styles  # noqa: E402

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# The scripts are part of the page. Otherwise forty requests would start only after Gradio has loaded, and after an
# upgrade a browser's cache could mix old and new scripts. Each module becomes a `blob:` URL, which replaces its name in
# the modules that import it. Other URLs are relative to the page's URL, so that they work behind a proxy.
ON_LOAD = r"""
const address = (path) => new URL("gradio_api/file=" + path, document.baseURI).href;
const blobs = {};
const module = (name) => (blobs[name] ??= blob(name));
const blob = (name) => {
  const code = props.scripts[name].replace(/from "\.\/(\w+\.js)"/g, (_, other) => `from "${module(other)}"`);
  return URL.createObjectURL(new Blob([code, `\n//# sourceURL=${name}`], { type: "text/javascript" }));
};
import(module("main.js")).then((main) => main.start({
  element, server, figures: props.figures, plotly: address(props.plotly), more: props.more,
}));
"""


@dataclass
class Visualizer:
    """The page and the parts behind it: the engine's thread (``None`` for a recording), record log, experiments."""

    blocks: gr.Blocks
    thread: Any  # PacedLoop, or None
    log: RecordLog
    url: str = ""
    public_url: str = ""  # through Gradio's servers; empty unless requested and available
    presenter: str = ""  # in a classroom, the secret token that allows a viewer to control the engine
    experiments: Experiments | None = None

    def close(self) -> None:
        """Stops the server and the engine's thread."""
        self.log.close()
        if self.experiments:
            self.experiments.close()
        if self.url:
            self.blocks.close(verbose=False)
        if self.thread:
            self.thread.stop()


def build(
    llm: Any,
    scenario: Scenario | None = OPENING,
    rate: float | None = DEFAULT_RATE,
    classroom: bool = False,
    load: Callable[..., Any] | None = None,
) -> Visualizer:
    """Builds the page for ``llm`` without serving it, and starts the engine's thread, which then owns ``llm.engine``.

    ``scenario`` starts when the first viewer connects, and again when a viewer presses "Play again"; with ``None``
    nothing plays automatically. ``rate`` is in steps per second; ``None`` means as fast as possible. In a
    ``classroom`` only a viewer with the presenter's token can control the engine and start the scenario. ``load``
    makes the `LLM` when a viewer chooses another model; ``None`` disables that choice.
    """
    log = RecordLog()
    thread = PacedLoop(llm, log, rate)
    experiments = Experiments()
    guard = Guard(_with_experiments(experiments, Commands(thread, scenario or OPENING, load)), classroom)
    recordings = Recordings(log)
    # The scenario until the first viewer (in a classroom: the presenter) starts it; it keeps the engine's own settings.
    unseen = [replace(scenario, settings={})] if scenario else []

    def begin() -> None:
        if unseen:
            thread.reset(unseen.pop())

    # Called by the page's JavaScript. Gradio sends a Response unchanged, so records are not encoded a second time.
    async def pull(request: Any) -> Response:
        if not classroom:
            begin()
        return Response(await log.pull(request), media_type="application/json")

    async def command(payload: Any) -> dict[str, Any]:
        if guard.knows(payload):
            begin()
        return await guard(payload)

    functions = [pull, command, recordings.recording, recordings.template]
    thread.start()
    blocks = _page(functions, {"recordings": recordings.shipped, "classroom": classroom})
    return Visualizer(blocks, thread, log, presenter=guard.token if classroom else "", experiments=experiments)


def build_replay(path: Path | None, note: str = "") -> Visualizer:
    """Builds the page for the recording at ``path`` (``None``: the recordings shipped with minipaged).

    Needs no engine and no torch. ``note`` is shown to the viewer. Raises ``ValueError`` if the file is no recording.
    """
    log = RecordLog()
    recordings = Recordings(log)
    name = recordings.add(path) if path else next(iter(recordings.shipped), None)
    if name is None:
        raise ValueError("there are no recordings to show; give one with --replay FILE")

    async def pull(request: Any) -> dict[str, Any]:
        return {}

    experiments = Experiments()

    async def command(payload: Any) -> dict[str, Any]:
        if isinstance(payload, dict) and payload.get("do") in LOOKING:
            return experiments(payload)
        return {"ok": False, "message": "This is a recording; there is no engine to control."}

    functions = [pull, command, recordings.recording, recordings.template]
    blocks = _page(functions, {"recordings": recordings.shipped, "replay": {"name": name, "note": note}})
    return Visualizer(blocks, None, log)


def _with_experiments(experiments: Experiments, commands: Commands) -> Callable[[Any], Any]:
    async def command(payload: Any) -> dict[str, Any]:
        if isinstance(payload, dict) and str(payload.get("do")).startswith("experiment"):
            return experiments(payload)
        return await commands(payload)

    return command


def _page(functions: list[Callable[..., Any]], more: dict[str, Any]) -> gr.Blocks:
    gr.set_static_paths([STATIC, PLOTLY])
    with gr.Blocks(title="minipaged", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            html_template=(STATIC / "page.html").read_text(encoding="utf-8"),
            js_on_load=ON_LOAD,
            server_functions=[_plain(function) for function in functions],
            apply_default_css=False,
            scripts={path.name: path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("*.js"))},
            plotly=PLOTLY.as_posix(),
            figures=figures_as_json(),
            more={
                "sources": sources(),
                "scenarios": menu(),
                "experiments": experiments_menu(),
                "choices": CHOICES,
            }
            | more,
        )
    return blocks


def mount(app: Any, visualizer: Visualizer, path: str) -> None:
    """Adds the page at ``path`` to ``app``, a FastAPI application that the caller serves."""
    gr.mount_gradio_app(
        app, visualizer.blocks, path=path, footer_links=[], run_history=False, ssr_mode=False,
        css=styles(served), theme=_theme(),
    )  # fmt: skip


def launch(
    llm: Any | Callable[[], Any] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    scenario: Scenario | None = OPENING,
    rate: float | None = DEFAULT_RATE,
    block: bool = True,
    open_browser: bool = False,
    classroom: bool = False,
    share: bool = False,
    replay: Path | None = None,
    recordings_will_do: bool = False,
    other_models: bool = True,
) -> Visualizer:
    """Serves the page. Returns when the user presses Ctrl-C, or immediately with ``block=False``.

    ``llm`` is an `LLM`, a function that makes one (called after the check that the port is free), or ``None`` for the
    embedded model with a KV block pool small enough to run full. If it cannot be loaded and ``recordings_will_do``, the
    page shows the recordings shipped with minipaged, except if a setting is wrong. ``other_models`` allows viewers on
    this machine to load models.
    ``replay`` shows a recording instead of an engine. In a ``classroom`` only the presenter controls the engine; the
    other viewers watch. ``share`` makes a public link through Gradio's servers and implies ``classroom``; without
    internet access only the local page is served.
    Raises `PortInUse`, and ``ValueError`` if ``replay`` is not a recording.
    """
    _check_port(host, port)
    classroom = classroom or share
    if replay is not None:
        visualizer = build_replay(replay)
    else:
        # Only viewers on this machine may load models; requests from the network may not.
        load = _load if host in LOOPBACK and not share and other_models else None
        visualizer = _with_engine(llm or _tiny, scenario, rate, classroom, load, recordings_will_do)
    try:
        visualizer.blocks.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True,
            inbrowser=open_browser, footer_links=[], run_history=False, ssr_mode=False,
            css=styles(served), theme=_theme(), favicon_path=STATIC / "favicon.svg",
        )  # fmt: skip
    except OSError:
        visualizer.close()
        raise _port_in_use(port) from None
    visualizer.url = f"http://{_own_address() if host == '0.0.0.0' else host}:{port}"
    visualizer.public_url = visualizer.blocks.share_url or "" if share else ""
    if visualizer.thread and host not in LOOPBACK and not classroom:
        print("any viewer on the network can control this engine; add --classroom to allow only you", flush=True)
    _tell(visualizer, share)
    if block:
        _until_interrupted()
        visualizer.close()
    return visualizer


def _tell(visualizer: Visualizer, share: bool) -> None:
    print(f"minipaged visualizer: {visualizer.url} (open it in a browser; Ctrl-C stops it)", flush=True)
    if visualizer.public_url:
        print(f"public link, to watch only: {visualizer.public_url}", flush=True)
    elif share:
        print("no public link could be made (is there internet access?); the local page above still works", flush=True)
    if visualizer.presenter:
        print(f"for the presenter only: {visualizer.url}/?presenter={visualizer.presenter}", flush=True)


def _own_address() -> str:
    """This machine's IP address on its network; its host name often does not resolve on other machines."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation; connecting a datagram socket sends nothing
            return probe.getsockname()[0]
        except OSError:  # no network at all
            return "127.0.0.1"


def _with_engine(
    llm: Any,
    scenario: Scenario | None,
    rate: float | None,
    classroom: bool,
    load: Callable[..., Any] | None,
    recordings_will_do: bool,
) -> Visualizer:
    try:
        llm = llm() if callable(llm) else llm
    except (MinipagedError, ImportError, OSError) as error:
        if isinstance(error, InvalidConfig) or not recordings_will_do:
            raise
        note = f"No model could be loaded ({error}). These are recordings of one."
        print(note, flush=True)
        return build_replay(None, note)
    return build(llm, scenario, rate, classroom, load)


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a bound method in a function: Gradio sets an attribute on server functions, and a method rejects it."""

    @wraps(method)
    async def function(request: Any) -> Any:
        return await method(request)

    return function


def _until_interrupted() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nstopped", flush=True)


def _tiny() -> Any:
    from minipaged import LLM

    return LLM("tiny", **DEMO_SETTINGS)


def _load(**settings: Any) -> Any:
    from minipaged import LLM

    return LLM(**settings)


def _theme() -> gr.themes.Base:
    """Gradio's base theme with the page's own fonts: the default theme would download others from the internet."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=list(SANS),
        font_mono=list(MONO),
    )


def _check_port(host: str, port: int) -> None:
    """Raises `PortInUse` if the port is taken, before time is spent on loading the model."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise _port_in_use(port) from None


def _port_in_use(port: int) -> PortInUse:
    return PortInUse(f"port {port} is in use; choose another one with --port {port + 1}")
