"""The page: one `gr.HTML` whose JavaScript pulls records and draws them, and the server around it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # noqa: E402
import plotly  # noqa: E402
from fastapi import Response  # noqa: E402

from minipaged.errors import MinipagedError  # noqa: E402
from visualizer.commands import Commands  # noqa: E402
from visualizer.engine_thread import DEFAULT_RATE, EngineThread  # noqa: E402
from visualizer.figures import memory_figure  # noqa: E402
from visualizer.log import RecordLog  # noqa: E402
from visualizer.scenarios import DEMO_SETTINGS, OPENING, Scenario, menu  # noqa: E402

STATIC = Path(__file__).resolve().parent / "static"
PLOTLY = Path(plotly.__file__).resolve().parent / "package_data" / "plotly.min.js"

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# The scripts are ES modules, hence `import()`; addresses are relative to the page's, as behind a proxy.
# Gradio sends files without a Cache-Control header, so a browser may mix old scripts with new ones after an
# upgrade; asking for each with "no-cache" first makes it compare them.
ON_LOAD = """
const address = (path) => new URL("gradio_api/file=" + path, document.baseURI).href;
Promise.all(props.scripts.map((path) => fetch(address(path), { cache: "no-cache" })))
  .then(() => import(address(props.main)))
  .then((module) => {
    const { figure, scenarios } = props;
    module.start({ element, server, figure, plotly: address(props.plotly), scenarios });
  });
"""


class PortInUse(MinipagedError, OSError):
    """Another program listens on the port."""


@dataclass
class Visualizer:
    """A page and the engine behind it."""

    blocks: gr.Blocks
    thread: EngineThread
    log: RecordLog
    url: str = ""

    def close(self) -> None:
        """Stops the server and the engine's thread."""
        self.log.close()
        if self.url:
            self.blocks.close(verbose=False)
        self.thread.stop()


def build(
    llm: Any,
    scenario: Scenario | None = OPENING,
    rate: float | None = DEFAULT_RATE,
    load: Callable[..., Any] | None = None,
) -> Visualizer:
    """The page for ``llm``, not served yet. Starts the engine's thread, which owns ``llm.engine`` then.

    ``scenario`` begins with the first viewer, and again whenever somebody presses "Play again"; ``None``:
    nothing plays by itself. ``rate`` is in steps per second, ``None`` for as fast as the machine can. ``load`` makes
    the `LLM` when a viewer asks for another model; ``None``: nobody may.
    """
    log = RecordLog()
    thread = EngineThread(llm, log, rate)
    commands = Commands(thread, scenario or OPENING, load)
    # On the engine as it was started, with the sizes that were asked for there.
    unseen = [replace(scenario, settings={})] if scenario else []  # emptied by the first viewer

    # Called by the page's JavaScript. A Response goes out as it is: no record is encoded a second time.
    async def pull(request: Any) -> Response:
        if unseen:
            thread.reset(unseen.pop())
        return Response(await log.pull(request), media_type="application/json")

    async def command(payload: Any) -> dict[str, Any]:
        return await commands(payload)

    gr.set_static_paths([STATIC, PLOTLY])
    with gr.Blocks(title="minipaged", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            html_template=(STATIC / "page.html").read_text(encoding="utf-8"),
            js_on_load=ON_LOAD,
            server_functions=[pull, command],
            apply_default_css=False,
            main=(STATIC / "main.js").as_posix(),
            scripts=[path.as_posix() for path in STATIC.glob("*.js")],
            plotly=PLOTLY.as_posix(),
            figure=json.loads(memory_figure().to_json()),
            scenarios=menu(),
        )
    thread.start()
    return Visualizer(blocks, thread, log)


def launch(
    llm: Any | Callable[[], Any] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    scenario: Scenario | None = OPENING,
    rate: float | None = DEFAULT_RATE,
    block: bool = True,
    open_browser: bool = False,
) -> Visualizer:
    """Serves the page. Returns when it is stopped with Ctrl-C, or at once if not ``block``.

    ``llm`` is an `LLM`, a function that makes one (called once the port is known to be free), or ``None`` for
    the embedded model with a pool small enough to run full. Raises `PortInUse`.
    """
    _check_port(host, port)
    if llm is None:
        llm = _tiny
    load = _load if host in LOOPBACK else None  # whoever is on the network may not make this machine load things
    visualizer = build(llm() if callable(llm) else llm, scenario, rate, load)
    try:
        visualizer.blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            inbrowser=open_browser, footer_links=[], run_history=False, ssr_mode=False,
            css_paths=[STATIC / "style.css", STATIC / "guide.css"], theme=_theme(), favicon_path=STATIC / "favicon.svg",
        )  # fmt: skip
    except OSError:
        visualizer.close()
        raise _port_in_use(port) from None
    visualizer.url = f"http://{host}:{port}"
    print(f"minipaged visualizer: {visualizer.url}", flush=True)
    if block:
        _until_interrupted()
        visualizer.close()
    return visualizer


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
    """System fonts: Gradio's default theme would fetch its own from the net."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
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
