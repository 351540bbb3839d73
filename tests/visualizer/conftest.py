"""A real engine, a real server and a real browser.

Without Chromium or playwright the browser tests are skipped, and the summary says so; ``MINIPAGED_REQUIRE_BROWSER=1``
makes that a failure.
"""

from __future__ import annotations

import os
import shutil
import socket
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

PATIENCE = 60_000  # milliseconds until something on a page counts as missing; a busy machine is slow, not wrong


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The embedded model with a pool that a few requests fill; ``MINIPAGED_TEST_MODEL`` names another one."""
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
        yield browser.new_context(viewport={"width": 1280, "height": 720})
        browser.close()


def _give_up(why: str) -> None:
    if os.environ.get("MINIPAGED_REQUIRE_BROWSER") == "1":
        pytest.fail(f"MINIPAGED_REQUIRE_BROWSER=1, but {why}")
    pytest.skip(f"THE PAGE WAS NOT TESTED IN A BROWSER: {why}")


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve(llm: LLM, free_port: int) -> Iterator[Callable[..., Visualizer]]:
    """``serve(**settings of launch)`` starts the page; all of them are closed in the end.

    Sequences go on to their max_tokens, whatever the model thinks, unless ``stories_end``.
    """
    served: list[Visualizer] = []
    eos = llm.engine.eos_token_ids

    def start(stories_end: bool = False, **settings: Any) -> Visualizer:
        llm.engine.eos_token_ids = eos if stories_end else frozenset()
        defaults = {"port": free_port, "scenario": None, "rate": None, "block": False}
        served.append(launch(llm, **(defaults | settings)))
        return served[-1]

    yield start
    for visualizer in served:
        visualizer.close()
    llm.engine.eos_token_ids = eos


class Pages:
    """Opens pages and remembers what no page may ever do: complain, or talk to another machine."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.complaints: list[str] = []

    def open(self, visualizer: Visualizer, query: str = "") -> Any:
        page = self._context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._console(message))
        page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        page.on("request", lambda request: self._request(request.url, visualizer.url))
        page.goto(visualizer.url + query)
        page.wait_for_function("window.minipaged && minipaged.player.run")
        return page

    def file(self, path: Path) -> Any:
        """Opens an exported page. It may request nothing but itself."""
        page = self._context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._console(message))
        page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        page.on("request", lambda request: self._request(request.url, path.as_uri()))
        page.goto(path.as_uri())
        page.wait_for_function("window.minipaged && minipaged.player.end > 1")
        return page

    def close(self) -> None:
        for page in self._context.pages:
            page.close()

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def _request(self, url: str, home: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            self.complaints.append(f"external request: {url}")


@pytest.fixture
def pages(browser: Any) -> Iterator[Pages]:
    """``pages.open(visualizer)``. Fails the test if a page complained or reached out."""
    pages = Pages(browser)
    yield pages
    pages.close()
    assert not pages.complaints
