"""Fixtures of the visualizer's tests: a real engine, a real server and a real browser.

Without Chromium or playwright the browser tests are skipped, and the summary says so; ``MINIPAGED_REQUIRE_BROWSER=1``
makes that a failure.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minipaged import LLM
from visualizer.app import Visualizer, launch
from visualizer.scenarios import DEMO_SETTINGS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

VIEWPORT = {"width": 1280, "height": 720}
# Widths are final only when all fonts are loaded, also those that no text uses yet.
FONTS = "Promise.all([...document.fonts].map((face) => face.load())).then((faces) => faces.length)"
PATIENCE = 60_000  # longest wait for the page in milliseconds; long, because a busy machine is slow


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The embedded model with a pool that a few requests fill; ``MINIPAGED_TEST_MODEL`` selects another model."""
    return LLM(os.environ.get("MINIPAGED_TEST_MODEL", "tiny"), **DEMO_SETTINGS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _give_up("playwright is not installed (pip install playwright)")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path or not Path(path).exists():
        _give_up("no Chromium found (apt-get install chromium, or set CHROMIUM to its path)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS)
        # One context and one port for all tests: the browser keeps Gradio's and plotly's scripts compiled.
        yield browser.new_context(viewport=VIEWPORT)
        browser.close()


def _give_up(why: str) -> None:
    if os.environ.get("MINIPAGED_REQUIRE_BROWSER") == "1":
        pytest.fail(f"MINIPAGED_REQUIRE_BROWSER=1, but {why}")
    pytest.skip(f"THE PAGE WAS NOT TESTED IN A BROWSER: {why}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def free_port() -> int:
    return _free_port()


@pytest.fixture
def launching(llm: LLM, free_port: int) -> Iterator[Callable[..., Visualizer]]:
    """``launching(…)`` takes launch's arguments and starts a new page, by default of the tests' engine."""
    served: list[Visualizer] = []
    eos = llm.engine.eos_token_ids

    def start(*engine: Any, stories_end: bool = False, **settings: Any) -> Visualizer:
        llm.engine.eos_token_ids = eos if stories_end else frozenset()
        engine = engine or (() if "replay" in settings else (llm,))
        defaults = {"port": free_port, "scenario": None, "rate": None, "block": False}
        served.append(launch(*engine, **(defaults | settings)))
        return served[-1]

    yield start
    for visualizer in served:
        visualizer.close()
    llm.engine.eos_token_ids = eos


class Shared:
    """One server and one tab, shared by most tests: starting them takes seconds, resetting them does not."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.home, self.eos = llm, llm.engine.config, llm.engine.eos_token_ids
        self.visualizer = launch(llm, port=_free_port(), scenario=None, rate=None, block=False)
        self.tab: Any = None

    def begin(self, rate: float | None, stories_end: bool) -> Visualizer:
        """Starts a new run on a reset engine, without a scenario."""
        thread = self.visualizer.thread
        thread.engine.eos_token_ids = self.eos if stories_end else frozenset()
        thread.set_rate(rate).result(20)
        thread.reset().result(20)
        return self.visualizer

    def rest(self) -> None:
        """Removes all requests and restores model and settings, because other tests use the same KV tensors."""
        thread, experiments = self.visualizer.thread, self.visualizer.experiments
        experiments.close()
        experiments.__init__()  # type: ignore[misc]
        thread.configure(self.home, self.llm if thread.llm is not self.llm else None).result(60)
        thread.reset().result(20)


@pytest.fixture(scope="session")
def shared(llm: LLM) -> Iterator[list[Shared]]:
    made: list[Shared] = []  # filled by the first test that needs it
    yield made
    for one in made:
        one.visualizer.close()


@pytest.fixture
def serve(llm: LLM, shared: list[Shared]) -> Iterator[Callable[..., Visualizer]]:
    """``serve()`` resets the shared page. Sequences run to their max_tokens and ignore end-of-text, unless
    ``stories_end``. A test that closes the page or needs another one uses `launching`."""

    def start(rate: float | None = None, stories_end: bool = False) -> Visualizer:
        if not shared:
            shared.append(Shared(llm))
        return shared[0].begin(rate, stories_end)

    yield start
    for one in shared:
        one.rest()


class Pages:
    """Opens pages and records their console errors and external requests, which no page may have."""

    def __init__(self, context: Any, shared: list[Shared]) -> None:
        self._context = context
        self._shared = shared
        self._watched: dict[Any, dict[str, Any]] = {}  # page → its listeners
        self.complaints: list[str] = []

    def open(self, visualizer: Visualizer, query: str = "") -> Any:
        """Opens a page that shows the run. Resets the shared page in its tab if that is free."""
        shared = next((one for one in self._shared if one.visualizer is visualizer and not query), None)
        if shared and shared.tab in self._context.pages and shared.tab not in self._watched:
            page = self._again(shared.tab, visualizer)
        else:
            page = self._new(visualizer.url)
            page.goto(visualizer.url + query)
            if shared:
                shared.tab = page
        self._wait_for_run(page, visualizer)
        page.evaluate(FONTS)
        return page

    def _wait_for_run(self, page: Any, visualizer: Visualizer) -> None:
        """Waits until the page shows the run, which changes when the first viewer starts a scenario."""
        deadline = time.monotonic() + PATIENCE / 1000
        while True:
            shown = page.evaluate("window.minipaged?.player.run")
            if shown and (visualizer.thread is None or shown == visualizer.log.run):  # a recording's run is its name
                return
            assert time.monotonic() < deadline, f"the page shows run {shown!r}, the engine's is {visualizer.log.run!r}"
            page.wait_for_timeout(20)

    def file(self, path: Path) -> Any:
        """Opens an exported page, which may request only its own file."""
        page = self.show(path.as_uri())
        page.wait_for_function("window.minipaged && minipaged.player.end > 1")
        return page

    def show(self, url: str, home: str = "") -> Any:
        """Opens a page that is none of the visualizer's. It may request addresses that begin with ``home``."""
        page = self._new(home or url)
        page.goto(url)
        page.evaluate(FONTS)
        return page

    def close(self) -> None:
        """Closes all pages but the shared tab, whose page it removes."""
        tabs = [one.tab for one in self._shared if not self.complaints]
        for page in self._context.pages:
            if page not in tabs:
                page.close()
            elif page in self._watched:
                page.evaluate("document.querySelector('.mp').remove()")
                for event, listener in self._watched[page].items():
                    page.remove_listener(event, listener)

    def _new(self, home: str) -> Any:
        return self._watch(self._context.new_page(), home)

    def _watch(self, page: Any, home: str) -> Any:
        page.set_default_timeout(PATIENCE)
        self._watched[page] = {
            "console": self._console,
            "pageerror": lambda error: self.complaints.append(f"page error: {error}"),
            "request": lambda request: self._request(request.url, home),
        }
        for event, listener in self._watched[page].items():
            page.on(event, listener)
        return page

    def _again(self, page: Any, visualizer: Visualizer) -> Any:
        """Resets the tab as a reload does, with the initial window."""
        self._watch(page, visualizer.url)
        page.bring_to_front()
        page.set_viewport_size(VIEWPORT)
        page.emulate_media(reduced_motion="no-preference")
        page.mouse.move(0, 0)
        page.evaluate("document.body.classList.remove('dark'); CSS.highlights.clear(); minipaged.again()")
        return page

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def _request(self, url: str, home: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            self.complaints.append(f"external request: {url}")


@pytest.fixture
def pages(browser: Any, shared: list[Shared]) -> Iterator[Pages]:
    """``pages.open(visualizer)`` opens pages. The test fails if a page has errors or external requests."""
    pages = Pages(browser, shared)
    yield pages
    pages.close()
    assert not pages.complaints
