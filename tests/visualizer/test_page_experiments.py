"""The Experiments view in a real browser, with a fast process in place of real measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged.experiments import Result, catalogue
from tests.visualizer.test_experiments import SLEEPS, result, saying, worker
from tests.visualizer.test_page import STORIES, submit
from visualizer.app import Visualizer
from visualizer.experiments import Experiments

FIGURE = {
    "data": [{"type": "bar", "name": "ours", "x": ["2", "4"], "y": [3.0, 5.0], "marker": {"color": "#0072b2"}}],
    "layout": {"title": {"text": "Saved blocks"}, "yaxis": {"title": {"text": "%"}}, "barmode": "group",
               "template": "plotly_white"},
}  # fmt: skip
DRAWN = "document.querySelector('[data-testid=exp-plot]')"


def one(name: str, **about: Any) -> Result:
    made = result(name, **about)
    made.figure = FIGURE
    return made


def open_view(page: Any) -> None:
    page.bring_to_front()
    page.click("[data-testid=nav-experiments]")
    page.wait_for_selector("[data-testid=experiments]")


def choose(page: Any, name: str) -> None:
    page.click(f"[data-testid=exp-{name}]")
    title = next(entry.title for entry in catalogue() if entry.name == name)
    page.wait_for_function("t => document.querySelector('[data-testid=exp-title]').textContent === t", arg=title)


def drawn(page: Any) -> list[float]:
    page.wait_for_function(f"{DRAWN}.data?.length")
    return page.evaluate(f"{DRAWN}.data[0].y")


def prepared(visualizer: Visualizer, command: tuple[str, ...], earlier: Path) -> Visualizer:
    """Replaces the visualizer's experiment process and the repository's results."""
    visualizer.experiments.__init__(earlier, command)  # type: ignore[misc]
    return visualizer


def test_an_experiment_runs_beside_the_engine_and_all_viewers_see_it(
    serve: Callable[..., Visualizer], pages: Any, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    command = worker(
        "import os\nsay(done=0.4, text='two samples')\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.02)\n"
        f"say(result=json.loads({one('parallel-sampling', quick=True).to_json()!r}))"
    )
    visualizer = prepared(serve(rate=40), command, tmp_path)
    page, other = pages.open(visualizer), pages.open(visualizer)
    open_view(page)
    listed = page.eval_on_selector_all("[data-testid=experiments] [data-name]", "all => all.map(n => n.dataset.name)")
    assert listed == [entry.name for entry in catalogue()]
    assert not page.is_visible("[data-part=scene]") and page.is_visible("[data-testid=exp-none]")
    choose(page, "parallel-sampling")
    page.click("[data-testid=exp-quick]")
    page.locator("[data-testid=exp-doing]").filter(has_text="40 % · two samples").wait_for()
    assert page.evaluate("document.querySelector('[data-part=exp-bar]').value") == 0.4
    assert page.is_visible("[data-testid=exp-cancel]") and not page.is_visible("[data-testid=exp-quick]")

    submit(visualizer, STORIES[:1])
    page.wait_for_function("minipaged.player.end > 20")  # the engine continues, and its records still arrive
    choose(page, "waste")
    assert page.is_disabled("[data-testid=exp-quick]"), "only one experiment at a time"
    open_view(other)
    other.wait_for_selector("[data-name=parallel-sampling][data-mark=running]")

    go.touch()
    for viewer in (page, other):
        viewer.bring_to_front()
        viewer.wait_for_selector("[data-name=parallel-sampling][data-mark=here]")
        choose(viewer, "parallel-sampling")
        assert drawn(viewer) == [3.0, 5.0]
    head, first, second = other.locator("[data-testid=exp-table] tr").all_inner_texts()
    assert [cell.lower() for cell in head.split("\t")] == ["", "paper", "here", "why they differ"]
    assert first.split("\t") == ["saved", "10**", "12.3 %", "dice"] and second.split("\t")[:3] == ["lost", "–", "5"]
    notes = other.inner_text("[data-testid=exp-notes]")
    assert "secondary source" in notes and "Assumed." in notes and "Measured in 3 seconds on abacus" in notes
    assert other.inner_text("[data-testid=exp-here]") == "Measured here, quick run"

    other.click("[data-testid=nav-watch]")
    other.wait_for_function("minipaged.player.position === minipaged.player.end && !minipaged.player.changed")
    assert other.is_visible("[data-part=scene]")
    other.wait_for_selector("[data-testid=block]:not([data-kind=free])")


def test_failures_and_cancelling_are_told(serve: Callable[..., Visualizer], pages: Any, tmp_path: Path) -> None:
    visualizer = prepared(serve(), worker("say(error='OutOfBlocks: no block is left')"), tmp_path)
    page = pages.open(visualizer)
    open_view(page)
    page.click("[data-testid=exp-full]")
    message = page.locator("[data-testid=exp-message]")
    message.filter(has_text="It failed: OutOfBlocks: no block is left").wait_for()
    choose(page, "latency")
    assert not message.is_visible(), "another experiment failed"
    prepared(visualizer, SLEEPS, tmp_path)
    page.click("[data-testid=exp-quick]")
    page.click("[data-testid=exp-cancel]")
    message.filter(has_text="Cancelled").wait_for()
    page.wait_for_selector("[data-testid=exp-quick]")
    assert page.is_enabled("[data-testid=exp-quick]")


def test_earlier_results_are_there_at_once_in_light_and_dark(
    serve: Callable[..., Visualizer], pages: Any, tmp_path: Path
) -> None:
    one("block-size").write(tmp_path)
    visualizer = prepared(serve(), saying(one("block-size", quick=True)), tmp_path)
    page = pages.open(visualizer)
    open_view(page)
    choose(page, "block-size")
    page.wait_for_selector("[data-testid=exp-earlier]")
    assert drawn(page) == [3.0, 5.0] and page.inner_text("[data-part=exp-caption]") == "Saved blocks"
    light = page.evaluate(f"{DRAWN}.layout.font.color")
    page.evaluate("document.body.classList.toggle('dark')")
    page.wait_for_function(f"c => {DRAWN}.layout.font.color !== c", arg=light)
    page.click("[data-testid=exp-quick]")
    page.wait_for_selector("[data-testid=exp-here][aria-pressed=true]")
    page.click("[data-testid=exp-earlier]")
    page.wait_for_selector("[data-testid=exp-earlier][aria-pressed=true]")
    page.wait_for_selector("[data-testid=exp-here][aria-pressed=false]")


def test_in_a_classroom_viewers_look_and_do_not_start(
    launching: Callable[..., Visualizer], pages: Any, tmp_path: Path
) -> None:
    visualizer = prepared(launching(classroom=True), SLEEPS, tmp_path)
    viewer = pages.open(visualizer)
    viewer.wait_for_selector("[data-role=viewer]")
    open_view(viewer)
    viewer.locator("[data-testid=exp-message]").filter(has_text="Only the presenter").wait_for()
    assert not viewer.is_visible("[data-testid=exp-quick]") and not viewer.is_visible("[data-testid=exp-full]")
    presenter = pages.open(visualizer, f"/?presenter={visualizer.presenter}")
    presenter.wait_for_selector("[data-role=presenter]")
    open_view(presenter)
    presenter.click("[data-testid=exp-quick]")
    presenter.wait_for_selector("[data-name=waste][data-mark=running]")
    viewer.bring_to_front()
    viewer.wait_for_selector("[data-name=waste][data-mark=running]")
    assert not viewer.is_visible("[data-testid=exp-cancel]")


def test_beside_a_recording_nothing_is_started(launching: Callable[..., Visualizer], pages: Any) -> None:
    recording = sorted((Path(__file__).resolve().parents[2] / "visualizer" / "recordings").glob("*.jsonl"))[0]
    page = pages.open(launching(replay=recording))
    open_view(page)
    page.locator("[data-testid=exp-message]").filter(has_text="without --replay").wait_for()
    assert not page.is_visible("[data-testid=exp-quick]")


@pytest.mark.parametrize("width, height", [(1280, 720), (1920, 1080), (390, 844)])
def test_it_fits(serve: Callable[..., Visualizer], pages: Any, tmp_path: Path, width: int, height: int) -> None:
    one("waste").write(tmp_path)
    page = pages.open(prepared(serve(), SLEEPS, tmp_path))
    page.set_viewport_size({"width": width, "height": height})
    open_view(page)
    drawn(page)
    root = page.evaluate("(({ scrollWidth, scrollHeight }) => [scrollWidth, scrollHeight])(document.documentElement)")
    assert root[0] <= width and (width < 900 or root[1] <= height)
    for name in ("exp-quick", "exp-plot", "nav-experiments"):
        box = page.locator(f"[data-testid={name}]").bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width, name
    cut = "all => all.filter(b => b.scrollWidth > b.clientWidth + 1).map(b => b.textContent)"
    if width > 900:
        assert page.eval_on_selector_all("[data-testid=experiments] [data-name] b", cut) == []
    page.set_viewport_size({"width": 1280, "height": 720})


def test_keys_do_not_move_what_is_not_seen(serve: Callable[..., Visualizer], pages: Any, tmp_path: Path) -> None:
    page = pages.open(prepared(serve(), SLEEPS, tmp_path))
    open_view(page)
    page.keyboard.press("Escape")
    page.locator("[data-testid=exp-title]").click()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press(" ")
    assert page.evaluate("minipaged.player.mode") == "live"


def test_the_class_is_what_the_server_uses(launching: Callable[..., Visualizer]) -> None:
    visualizer = launching()
    assert isinstance(visualizer.experiments, Experiments)
    visualizer.experiments.start("waste", True)
    process = visualizer.experiments._run.process
    visualizer.close()
    assert process.wait(timeout=30) != 0, "the server should end the process"
