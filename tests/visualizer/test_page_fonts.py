"""The page brings its fonts along: every letter is in one of them, on the live page and in an exported one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged.labs import find
from minipaged.labs.checking import Result
from minipaged.labs.class_page import page as class_page
from minipaged.labs.grade import Row
from tests.visualizer.test_experiments import SLEEPS
from tests.visualizer.test_page import caught_up, steps, submit
from tests.visualizer.test_page_experiments import drawn, one, open_view, prepared
from tests.visualizer.test_playback import FORK, GOLDEN
from visualizer.app import Visualizer
from visualizer.export import export
from visualizer.sources import ROOT, sources
from visualizer.styles import STATIC

FAMILIES = {"Inter Variable", "JetBrains Mono", "JetBrains Mono SemiBold"}  # as the files call themselves
MOST = 150 * 1024  # bytes of all font files
MARK = """(all) => all.filter((node) => node.checkVisibility() && (node.matches("select, input, textarea")
  || [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim())))
  .forEach((node) => node.setAttribute("data-read", ""))"""


def strangers(page: Any, *parts: str) -> dict[str, str]:
    """The fonts that some text is drawn in although the page does not bring them along, each with such an element.

    Each selector of ``parts`` must find text that is seen. Starts again if the page redraws in the meantime.
    """
    from playwright.sync_api import Error  # here, because the tests run without playwright, too

    for _ in range(20):
        try:
            return _strangers(page, *parts)
        except Error as error:
            if "Could not find node" not in str(error):
                raise
    raise AssertionError("the page is never at rest")


def _strangers(page: Any, *parts: str) -> dict[str, str]:
    page.eval_on_selector_all("body *", MARK)
    for part in parts:
        assert page.locator(f"{part}[data-read], {part} [data-read]").count(), f"nothing is written in {part}"
    session = page.context.new_cdp_session(page)
    session.send("DOM.enable")
    session.send("CSS.enable")
    root = session.send("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
    nodes = session.send("DOM.querySelectorAll", {"nodeId": root, "selector": "[data-read]"})["nodeIds"]
    found = {}
    for node in nodes:
        for font in session.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]:
            if not font["isCustomFont"] or font["familyName"] not in FAMILIES:
                found[font["familyName"]] = session.send("DOM.getOuterHTML", {"nodeId": node})["outerHTML"][:300]
    session.detach()
    page.eval_on_selector_all("[data-read]", "all => all.forEach((node) => node.removeAttribute('data-read'))")
    return found


@pytest.fixture
def page(serve: Callable[..., Visualizer], pages: Any, tmp_path: Path) -> Any:
    """Shows texts that share blocks, at rest."""
    one("waste").write(tmp_path)
    visualizer = prepared(serve(), SLEEPS, tmp_path)
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, FORK)
    steps(visualizer, 20)
    caught_up(page, visualizer)
    page.wait_for_selector("[data-testid=charts] .legendtext")
    return page


def test_watching(page: Any) -> None:
    parts = (".mp-id", ".mp-who", ".mp-chip", ".mp-badge", "button", "select", "input", "[data-testid=narration]",
             "[data-testid=source]", "[data-testid=charts] svg", ".mp-lede", ".mp-hint")  # fmt: skip
    assert strangers(page, *parts) == {}
    page.click("[data-testid=tab-waste]")
    page.click("[data-testid=events-toggle]")
    assert strangers(page, "[data-testid=waste-say]", "[data-testid=events]") == {}
    gradio = "getComputedStyle(document.querySelector('.gradio-container')).fontFamily"  # its messages, and the like
    assert page.evaluate(gradio).startswith("Inter")


def test_what_opens(page: Any) -> None:
    page.click("[data-testid=sequence] .mp-badge")
    page.wait_for_selector("[data-testid=runs] [data-go^='token:']")
    assert strangers(page, "[data-testid=drawer]") == {}
    page.locator("[data-testid=runs] [data-go^='token:']").all()[-3].click()
    page.wait_for_selector("[data-testid=odds]")
    page.wait_for_selector("[data-testid=attention-block]")
    assert strangers(page, "[data-testid=odds]", "[data-testid=attention-block]") == {}
    page.keyboard.press("Escape")
    page.click("[data-testid=source]")
    assert strangers(page, "[data-testid=source-panel] pre") == {}
    page.keyboard.press("Escape")
    page.click("[data-testid=settings]")
    assert strangers(page, "[data-testid=settings-dialog]") == {}
    page.keyboard.press("Escape")


def test_chat_and_experiments(page: Any) -> None:
    page.click("[data-testid=nav-chat]")
    assert strangers(page, "[data-testid=chat]", "[data-testid=chat-text]") == {}
    open_view(page)
    drawn(page)
    page.wait_for_selector("[data-testid=exp-plot] .xtick")
    page.locator("[data-testid=exp-plot] .bars .point").first.hover(force=True)
    page.wait_for_selector("[data-testid=exp-plot] .hovertext")
    assert strangers(page, "[data-testid=exp-table]", "[data-testid=exp-plot] .xtick", ".hovertext") == {}


@pytest.mark.parametrize("width, height", [(1280, 720), (1920, 1080), (390, 844)])
def test_no_text_is_cut(page: Any, width: int, height: int) -> None:
    """But for texts of any length: those of the model, the block tables, and what a phone shows the beginning of."""
    page.set_viewport_size({"width": width, "height": height})
    cut = """(all) => all.filter((node) => node.checkVisibility() && node.scrollWidth > node.clientWidth + 1
      && getComputedStyle(node).overflowX !== "visible" && !node.matches("input, canvas, svg *, .mp-line, .mp-table"))
      .map((node) => node.outerHTML.slice(0, 200))"""
    for tab in ("memory", "waste", "throughput", "latency", "sequences", "prefix"):
        page.click(f"[data-testid=tab-{tab}]")
        page.wait_for_timeout(100)
        assert page.eval_on_selector_all(".mp *", cut) == [], tab
    page.click("[data-testid=nav-chat]")
    assert page.eval_on_selector_all(".mp *", cut) == []
    brand, nav = (page.locator(part).bounding_box() for part in (".mp-brand b", ".mp-nav"))
    assert brand["x"] + brand["width"] <= nav["x"]


def test_an_exported_page(pages: Any, tmp_path: Path) -> None:
    file = tmp_path / "replay.html"
    file.write_text(export(GOLDEN[0].read_text(encoding="utf-8")), encoding="utf-8")
    page = pages.file(file)
    page.evaluate("minipaged.player.seek(20)")
    page.wait_for_selector("[data-testid=charts] .legendtext")
    assert strangers(page, ".mp-id", ".mp-chip", "button", "[data-testid=charts] svg") == {}


def test_the_figure_of_an_experiment(pages: Any, tmp_path: Path) -> None:
    one("waste").write(tmp_path)
    page = pages.show((tmp_path / "waste.html").as_uri(), home=tmp_path.as_uri())  # plotly.min.js lies beside it
    page.wait_for_selector(".xtick text")
    page.locator(".bars .point").first.hover(force=True)
    page.wait_for_selector(".hovertext")
    assert strangers(page, ".gtitle", ".xtick", ".hovertext") == {}


def test_the_report_on_a_class(pages: Any, tmp_path: Path) -> None:
    failed = Result("a", "A task", 0, 1, "fail", "one block too many", ["step 1: ✗"])
    file = tmp_path / "report.html"
    file.write_text(class_page(find("A1"), [Row("ann", "0", [failed], finished=True)]), encoding="utf-8")
    page = pages.show(file.as_uri())
    page.click("summary")
    assert strangers(page, "h1", "td", "pre") == {}


def test_all_characters_that_are_written_somewhere(page: Any) -> None:
    """In messages that this run does not show, too, and in the engine's code, which the page quotes."""
    files = [*STATIC.glob("*.*"), *STATIC.parent.glob("*.py"), *(ROOT / "minipaged" / "experiments").glob("*.py")]
    texts = [path.read_text("utf-8") for path in files] + [json.dumps(sources(), ensure_ascii=False)]
    written = {char for char in "".join(texts) if char.isprintable()}
    assert {"→", "✗", "≡", "§", "×"} <= written
    add = """(text) => ["sans", "mono"].forEach((family) => ["400", "700"].forEach((weight) => {
        const node = document.createElement("p");
        node.className = "test-characters";
        node.textContent = text;
        node.style.font = `${weight} 12px var(--mp-${family})`;
        document.querySelector(".mp").append(node); }))"""
    page.evaluate(add, "".join(sorted(written)))
    assert strangers(page, ".test-characters") == {}


def test_a_font_of_the_machine_is_found_out(page: Any) -> None:
    page.eval_on_selector("[data-testid=generate]", "node => (node.style.fontFamily = 'monospace')")
    found = strangers(page)
    page.eval_on_selector("[data-testid=generate]", "node => (node.style.fontFamily = '')")
    assert len(found) == 1 and "Generate" in found.popitem()[1]


def test_the_files_are_small_and_have_their_licence() -> None:
    files = list((STATIC / "fonts").glob("*.woff2"))
    assert files and sum(file.stat().st_size for file in files) <= MOST
    assert all(f'url("fonts/{file.name}")' in (STATIC / "fonts.css").read_text("utf-8") for file in files)
    licence = (STATIC / "fonts" / "OFL.txt").read_text("utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    for family in ("Inter", "JetBrains Mono"):
        assert f"The {family} Project Authors" in licence
        assert family in (STATIC.parent.parent / "NOTICE").read_text("utf-8")
