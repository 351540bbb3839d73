"""The page: one `gr.HTML` whose JavaScript pulls records and draws them, and the server around it."""

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
from minipaged.errors import MinipagedError, PortInUse  # noqa: E402
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

# The scripts come with the page: forty requests would only begin once Gradio has loaded itself, and a browser's cache
# could mix old scripts with new ones after an upgrade. Each module becomes a `blob:` address, which the modules that
# import it are given in place of its name. Other addresses are relative to the page's, as behind a proxy.
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
    """A page and the engine behind it (none, if it shows recordings)."""

    blocks: gr.Blocks
    thread: Any  # PacedLoop, or None
    log: RecordLog
    url: str = ""
    public_url: str = ""  # through Gradio's servers, if asked for and possible
    presenter: str = ""  # in a classroom, the token without which nobody controls the engine
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
    """The page for ``llm``, not served yet. Starts the engine's thread, which owns ``llm.engine`` then.

    ``scenario`` begins with the first viewer, and again whenever somebody presses "Play again"; ``None``:
    nothing plays by itself. ``rate`` is in steps per second, ``None`` for as fast as the machine can.
    In a ``classroom`` only who knows the presenter's token controls the engine, and begins the scenario. ``load`` makes
    the `LLM` when somebody asks for another model; ``None``: nobody may.
    """
    log = RecordLog()
    thread = PacedLoop(llm, log, rate)
    experiments = Experiments()
    guard = Guard(_with_experiments(experiments, Commands(thread, scenario or OPENING, load)), classroom)
    recordings = Recordings(log)
    # Emptied by the first viewer, in a classroom by the presenter; on the engine with the sizes it was started with.
    unseen = [replace(scenario, settings={})] if scenario else []

    def begin() -> None:
        if unseen:
            thread.reset(unseen.pop())

    # Called by the page's JavaScript. A Response goes out as it is: no record is encoded a second time.
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
    """The page for the recording at ``path`` (``None``: those that minipaged comes with): no engine, no torch.

    ``note`` is said to the viewer. Raises ``ValueError`` for a file that is not a recording.
    """
    log = RecordLog()
    recordings = Recordings(log)
    name = recordings.add(path) if path else next(iter(recordings.shipped), None)
    if name is None:
        raise ValueError("there are no recordings to show")

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
    """Makes the page part of ``app``, a FastAPI application that somebody else serves."""
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
    """Serves the page. Returns when it is stopped with Ctrl-C, or at once if not ``block``.

    ``llm`` is an `LLM`, a function that makes one (called once the port is known to be free), or ``None`` for
    the embedded model with a pool small enough to run full. If it cannot be loaded and ``recordings_will_do``, the
    recordings that minipaged comes with are shown. ``other_models``: viewers on this machine may load some.
    ``replay`` shows a recording instead of an engine; ``ValueError`` if it is none. In a ``classroom`` viewers watch,
    and only the presenter controls. ``share`` makes a public link through Gradio's servers, and a classroom of whoever
    opens it; without the internet the local page goes on alone.
    Raises `PortInUse`.
    """
    _check_port(host, port)
    classroom = classroom or share
    if replay is not None:
        visualizer = build_replay(replay)
    else:
        # Whoever is on the network may not make this machine load things.
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
        print("anybody who can reach this machine can control the engine; --classroom keeps that to you", flush=True)
    _tell(visualizer, share)
    if block:
        _until_interrupted()
        visualizer.close()
    return visualizer


def _tell(visualizer: Visualizer, share: bool) -> None:
    print(f"minipaged visualizer: {visualizer.url}", flush=True)
    if visualizer.public_url:
        print(f"for everybody who knows it, to watch: {visualizer.public_url}", flush=True)
    elif share:
        print("no public link could be made (is the internet there?); the page above works all the same", flush=True)
    if visualizer.presenter:
        print(f"for the presenter only: {visualizer.url}/?presenter={visualizer.presenter}", flush=True)


def _own_address() -> str:
    """This machine's address in its network. Its name would often be known to itself alone."""
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
        if not recordings_will_do:
            raise
        note = f"No model could be loaded ({error}). These are recordings of one."
        print(note, flush=True)
        return build_replay(None, note)
    return build(llm, scenario, rate, classroom, load)


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """Gradio writes an attribute on every server function, which a bound method does not take."""

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
    """The page's own fonts: Gradio's default theme would bring others."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=list(SANS),
        font_mono=list(MONO),
    )


def _check_port(host: str, port: int) -> None:
    """Before the model is loaded in vain."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise _port_in_use(port) from None


def _port_in_use(port: int) -> PortInUse:
    return PortInUse(f"port {port} is in use; choose another one with --port {port + 1}")
