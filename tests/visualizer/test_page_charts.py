"""The charts panel in a real browser: tabs, the numbers at the current position, and agreement with Python's accounts.

Tested live, in a recording, and in an exported page, which has no server.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minipaged.events import Event, event_from_dict, load_recording
from minipaged.events.metrics import Metrics
from minipaged.events.waste import MANAGERS, Accounts
from tests.visualizer.test_page import STORIES, caught_up, finish, steps, submit
from tests.visualizer.test_playback import GOLDEN
from visualizer.app import Visualizer
from visualizer.export import export

# The text of the bar table for each memory manager.
TABLE = """() => [...document.querySelectorAll("[data-manager]")].map((row) => [
    row.dataset.manager, row.querySelector(".mp-w-words").textContent, row.querySelector(".mp-w-fit").textContent])"""
LENGTHS = "(id) => document.querySelector(`[data-testid=${id}]`).data.map((trace) => trace.x.length)"


def expected(row: list[int]) -> list[list[str]]:
    cells = [row[3 + 5 * i : 8 + 5 * i] for i in range(len(MANAGERS))]
    return [
        [name, f"holds {sum(held)} slots for {held[0]} tokens", f"{fit} of {row[2]} fit"]
        for name, (*held, fit) in zip(MANAGERS, cells, strict=True)
    ]


def flat(number: int, row: Any) -> list[int]:
    """A row in the page's format: number, step, running; token, reserved, internal, external, fit per manager."""
    return [number, row.step, row.running, *(n for name in MANAGERS for n in (*row.held[name], row.fit[name]))]


def rows_after(records: list[list[Event]]) -> list[list[int]]:
    """What each manager holds after each record, as computed by Python."""
    accounts = Accounts()
    for events in records:
        for event in events:
            accounts.apply(event)
        accounts.close()
    accounts.update()
    return [flat(number, row) for number, row in accounts.rows.items()]


def rows_of(visualizer: Visualizer) -> list[list[int]]:
    return rows_after(events_of(visualizer))


def events_of(visualizer: Visualizer) -> list[list[Event]]:
    """The run's records. The run must be short enough that the log still has all of them."""
    start = visualizer.thread.call(visualizer.thread.engine.started_event).result(20)
    answer = json.loads(visualizer.log.news(visualizer.log.run, 0, None) or "")
    first, *others = [[event_from_dict(event) for event in record] for record in answer["records"]]
    return [[start, *first], *others]


def looks_at(page: Any, number: int) -> None:
    page.evaluate("(position) => minipaged.player.seek(position)", number + 1)
    page.wait_for_function(
        "(n) => document.querySelector('[data-testid=waste-bars]').dataset.number === String(n)", arg=number
    )


def test_the_waste_shown_is_the_servers_at_every_moment(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    ids = submit(visualizer)
    steps(visualizer, 40)
    caught_up(page, visualizer)
    page.click("[data-testid=tab-waste]")
    now = rows_of(visualizer)
    page.wait_for_function(
        "n => document.querySelector('[data-testid=waste-bars]').dataset.number === n", arg=str(now[-1][0])
    )
    assert page.evaluate(TABLE) == expected(now[-1])
    for number in (10, 25):
        looks_at(page, number)
        assert page.evaluate(TABLE) == expected(now[number])
        held = [sum(now[number][3 + 5 * i : 7 + 5 * i]) for i in range(len(MANAGERS))]
        words = page.text_content("[data-testid=waste-say]")
        assert f"{held[0] / held[-1]:.1f}×" in words and f"{now[number][7]} of these {now[number][2]}" in words

    # A sequence that ends before its limit changes earlier rows, for this viewer and for a late one.
    visualizer.thread.abort(ids[0]).result(20)
    visualizer.thread.resume().result(20)
    finish(visualizer)
    later = rows_of(visualizer)
    assert later[25] != now[25]
    late = pages.open(visualizer)
    late.click("[data-testid=tab-waste]")
    for viewer in (page, late):
        viewer.bring_to_front()
        looks_at(viewer, 25)
        viewer.wait_for_function(f"want => JSON.stringify(({TABLE})()) === want", arg=json.dumps(
            expected(later[25]), separators=(",", ":"), ensure_ascii=False))  # fmt: skip


def test_tabs_enlarging_and_what_each_chart_draws(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    steps(visualizer, 10)
    submit(visualizer, [replace(STORIES[1], n=1)])  # a prompt that is in the prefix cache by now
    steps(visualizer, 20)
    caught_up(page, visualizer)
    records = visualizer.log.end
    page.wait_for_function(f"({LENGTHS})('chart')?.[0] === {records}")
    process = page.evaluate("document.querySelector('[data-testid=chart]').data[3].y")
    assert len(process) == records and all(mib > 50 for mib in process), "the process' memory beside the slots"
    assert f"process: {process[-1]} MiB" in (page.text_content("[data-testid=chart-now]") or "")

    page.focus("[data-testid=tab-memory]")
    position = page.evaluate("minipaged.player.position")
    for name in ("waste", "throughput", "latency", "sequences", "prefix", "memory", "waste"):
        page.keyboard.press("ArrowRight")
        assert page.get_attribute(f"[data-testid=tab-{name}]", "aria-selected") == "true"
        assert page.locator("[role=tabpanel]:visible").get_attribute("data-chart") == name
        assert page.evaluate("document.activeElement.dataset.testid") == f"tab-{name}"
    assert page.evaluate("minipaged.player.position") == position, "arrow keys in tabs must not move the position"

    page.click("[data-testid=tab-throughput]")
    drawn = "document.querySelector('[data-testid=chart-throughput]').data"
    page.wait_for_function(f"{drawn}?.[0].x.length === {records}")
    events = [event for record in events_of(visualizer) for event in record]
    batches = [event.num_tokens for event in events if event.type == "step_finished"]
    decode, prefill, ms, _ = page.evaluate(f"{drawn}.map((trace) => [...trace.y])")
    # Records between steps, such as a request's arrival, contain no computed tokens.
    assert [a + b for a, b in zip(decode, prefill, strict=True) if a + b] == batches
    assert ms[-1] > 0

    page.click("[data-testid=tab-sequences]")
    bars = "document.querySelector('[data-testid=chart-sequences]').data?.map((trace) => trace.y.length)"
    page.wait_for_function(f"{bars}?.[2] === 8")  # all sequences decode by now

    page.click("[data-testid=tab-prefix]")
    metrics = Metrics(visualizer.thread.engine.started_event())
    for event in events:
        metrics(event)
    found = f"{metrics.cached_tokens} of {metrics.prompt_tokens} tokens found"
    page.locator("[data-testid=chart-now]").filter(has_text=found).wait_for()
    assert metrics.cached_tokens >= 16

    page.set_viewport_size({"width": 1000, "height": 720})  # too narrow for all tabs and buttons in one row
    page.click("[data-testid=tab-waste]")
    places = [page.locator(f"[data-testid={name}]").bounding_box() for name in ("tab-waste", "enlarge")]
    assert abs(places[0]["y"] - places[1]["y"]) < 3, "the button must stay in the tabs' row"
    page.set_viewport_size({"width": 1280, "height": 720})
    page.click("[data-testid=tab-prefix]")

    page.click("[data-testid=enlarge]")
    page.evaluate("document.activeElement.blur()")
    wide = "document.querySelector('[data-testid=chart-prefix] svg').clientWidth"
    page.wait_for_function(f"{wide} > 1000")
    page.keyboard.press("Escape")
    page.wait_for_function(f"{wide} < 700")

    # A frozen view keeps its charts, with a line at the current position; a new run clears them.
    page.click("[data-testid=tab-memory]")
    page.evaluate("minipaged.player.seek(12)")
    shape = "document.querySelector('[data-testid=chart]').layout.shapes.find((s) => s.name === 'moment')"
    page.wait_for_function(f"{shape}.visible && {shape}.x0 === minipaged.player.state.step")
    assert page.evaluate(LENGTHS, "chart") == [records] * 4
    visualizer.thread.reset().result(20)
    submit(visualizer, STORIES[:1])
    steps(visualizer, 3)
    caught_up(page, visualizer)
    page.wait_for_function(f"({LENGTHS})('chart')[0] === {visualizer.log.end}")
    assert page.evaluate(f"{shape}.visible") is False


ROWS = """() => {
    const { player, charts } = minipaged;
    charts.views.waste.accounts.follow(player);
    return [charts.views.waste.accounts.rows, player.records.map((record) => record.events)];
}"""


def books_agree(page: Any, path: Path) -> list[list[int]]:
    rows, records = page.evaluate(ROWS)
    assert sum(map(len, records)) == len(load_recording(path))
    assert rows == rows_after([[event_from_dict(event) for event in record] for record in records])
    assert max(row[2] for row in rows) >= 4
    return rows


@pytest.mark.parametrize("path", GOLDEN[1:], ids=[path.stem for path in GOLDEN[1:]])
def test_the_books_agree_on_what_is_shipped(path: Path, serve: Callable[..., Visualizer], pages: Any) -> None:
    """Python's and JavaScript's accounts agree after every record of a recording."""
    page = pages.open(serve())
    page.set_input_files("[data-testid=file]", path)
    page.wait_for_function("minipaged.player.recording")
    books_agree(page, path)


def test_an_exported_page_keeps_books_and_draws_charts(pages: Any, tmp_path: Path) -> None:
    path, file = GOLDEN[0], tmp_path / "replay.html"
    file.write_text(export(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert file.stat().st_size < 3_000_000, "the file should fit into an e-mail"
    page = pages.file(file)
    rows = books_agree(page, path)
    page.click("[data-testid=tab-waste]")
    busiest = max(range(len(rows)), key=lambda number: rows[number][2])
    looks_at(page, busiest)
    assert page.evaluate(TABLE) == expected(rows[busiest])
    page.click("[data-testid=waste-toggle]")
    page.wait_for_function("document.querySelector('[data-testid=waste-line]').data?.[0].x.length > 10")
    for name in ("memory", "throughput", "latency", "sequences", "prefix"):
        page.click(f"[data-testid=tab-{name}]")
        panel = "chart" if name == "memory" else f"chart-{name}"
        page.wait_for_function(
            "id => document.querySelector(`[data-testid=${id}]`).data?.some((trace) => trace.x.length)", arg=panel
        )
        assert page.locator(f"[data-testid={panel}] svg.main-svg").first.is_visible()


def test_the_books_follow_a_run_whose_beginning_is_forgotten(
    serve: Callable[..., Visualizer], pages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late viewer starts with a keyframe, amid running sequences; records that the page dropped have no row."""
    monkeypatch.setattr("visualizer.log.HISTORY", 10)
    visualizer = serve()
    early = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, STORIES[:1] + STORIES[2:])
    steps(visualizer, 70)
    late = pages.open(visualizer)
    for page in (early, late):
        caught_up(page, visualizer)
    steps(visualizer, 5)
    (everything, _), (rest, _) = [(caught_up(page, visualizer), page.evaluate(ROWS))[1] for page in (early, late)]
    first = late.evaluate("minipaged.player.first")
    assert first >= 40 and rest == everything[first:] and everything == rows_of(visualizer)
    # Drops the oldest records, as the page does in a long run.
    early.evaluate("""() => { const { player } = minipaged;
        player.seek(40);
        player.keyframes.set(40, JSON.stringify(player.state));
        player.forgetOldest(); }""")
    steps(visualizer, 1)
    caught_up(early, visualizer)
    rows, _ = early.evaluate(ROWS)
    assert [row[0] for row in rows] == list(range(40, visualizer.log.end)) and rows[: len(rest)] == rest
