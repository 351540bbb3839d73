"""Accessibility: axe-core finds no serious issue in drawers, dialogs, the quiz, the chat, charts and recordings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import axe_core_python.base as axe  # from the dev extra; without it, these tests fail

from tests.visualizer.test_experiments import SLEEPS
from tests.visualizer.test_page import caught_up, steps, submit
from tests.visualizer.test_playback import FORK, GOLDEN
from visualizer.app import Visualizer
from visualizer.scenarios import SCENARIOS

SCRIPT = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def check(page: Any, what: str) -> list[str]:
    """Serious and critical issues that axe finds on the current page, in the light and the dark theme."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(SCRIPT)
    # Without transitions, because their intermediate colours would fail the contrast check.
    still = page.add_style_tag(
        content="*, *::before, *::after { transition: none !important; animation: none !important; }"
    )
    serious = []
    for theme in ("light", "dark"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        found = page.evaluate("axe.run('.mp', { resultTypes: ['violations'] })")
        serious += [
            f"{what}, {theme}: {rule['id']}: {node['html'][:200]}: "
            f"{node['any'][0]['message'] if node['any'] else rule['help']}"
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
    page.evaluate("document.body.classList.remove('dark')")
    still.evaluate("node => node.remove()")  # the tab may be another test's next, where things move
    return serious


def test_the_drawer(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, FORK)
    steps(visualizer, 20)
    caught_up(page, visualizer)
    block = page.locator("[data-testid=block]:not([data-refs='0'])").first
    block.click()
    page.wait_for_selector("[data-testid=drawer]:visible")
    serious = check(page, "block")
    page.click("[data-testid=sequence] .mp-badge")  # the badge, because a click elsewhere may hit a token
    page.wait_for_selector("[data-testid=runs] [data-go^='token:']")
    serious += check(page, "sequence")
    page.locator("[data-testid=runs] [data-go^='token:']").all()[-3].click()
    page.wait_for_selector("[data-testid=attention-block]")
    page.wait_for_selector("[data-testid=odds]")
    serious += check(page, "token and attention")
    assert not serious, "\n".join(serious)


def test_settings_source_and_large_charts(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, FORK)
    steps(visualizer, 12)
    caught_up(page, visualizer)
    page.click("[data-testid=settings]")
    page.fill("[data-testid=set-top_p]", "7")
    page.press("[data-testid=set-top_p]", "Tab")
    page.wait_for_selector("[data-testid=bad-top_p]:visible")
    serious = check(page, "settings")
    page.keyboard.press("Escape")
    page.click("[data-testid=source]")
    page.wait_for_selector("[data-testid=source-lines]")
    serious += check(page, "source")
    page.keyboard.press("Escape")
    page.click("[data-testid=enlarge]")
    for tab in ("waste", "latency", "sequences"):
        page.click(f"[data-testid=tab-{tab}]")
        page.wait_for_function(
            "tab => document.querySelector(`[data-chart=${tab}] svg.main-svg`)?.clientWidth > 100", arg=tab
        )
        serious += check(page, f"large chart: {tab}")
    assert not serious, "\n".join(serious)


def test_the_quiz(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.select_option("[data-testid=scenario]", "samples")
    page.locator("[data-testid=choice]:enabled").first.wait_for()
    visualizer.thread.call(lambda: setattr(visualizer.thread, "_question_ends", time.monotonic() + 600)).result(20)
    serious = check(page, "question")
    page.locator("[data-testid=choice]:enabled").first.click()
    page.locator("[data-testid=choice]:enabled").first.wait_for(state="detached")
    serious += check(page, "verdict")
    assert not serious, "\n".join(serious)


def test_the_chat(serve: Callable[..., Visualizer], pages: Any) -> None:
    page = pages.open(serve(stories_end=True))
    page.click("[data-testid=nav-chat]")
    page.fill("[data-testid=chat-text]", "What is a block table?")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-testid=answer][data-done]")
    serious = check(page, "chat")
    assert not serious, "\n".join(serious)


def test_a_recording(launching: Callable[..., Visualizer], pages: Any) -> None:
    page = pages.open(launching(replay=GOLDEN[0]))
    page.evaluate("minipaged.player.seek(60)")
    page.click("[data-testid=recordings-toggle]")
    serious = check(page, "recording")
    assert not serious, "\n".join(serious)


def test_the_experiments(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.click("[data-testid=nav-experiments]")
    page.wait_for_selector("[data-testid=exp-table] tr")
    serious = check(page, "a result")
    visualizer.experiments._worker = SLEEPS
    page.click("[data-testid=exp-quick]")
    page.wait_for_selector("[data-testid=exp-run]")
    serious += check(page, "running")
    assert not serious, "\n".join(serious)


def test_memory_that_is_set_aside(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.reset(SCENARIOS["fragmentation"]).result(20)
    page.wait_for_selector("[data-testid=block][data-kind=reserved]")
    visualizer.thread.pause().result(20)
    caught_up(page, visualizer)
    serious = check(page, "contiguous memory")
    visualizer.thread.reset(SCENARIOS["without-holes"]).result(20)  # back to paged memory for other tests
    assert not serious, "\n".join(serious)
