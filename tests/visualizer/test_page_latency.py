"""The latency chart: time to first token and inter-token latency, compared with a second computation in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged.events import event_from_dict
from tests.visualizer.test_page import STORIES, caught_up, steps, submit
from tests.visualizer.test_playback import GOLDEN
from visualizer.app import Visualizer

RECENT = 256
READ = """() => {
    const { player, charts } = minipaged;
    charts.history.follow(player);
    const { points, latency } = charts.history;
    return {
        firsts: latency.firsts.map(({ number, seq, ms }) => [number, seq, ms]),
        percentiles: points.map(({ p50, p95, p99 }) => [p50, p95, p99]),
        records: player.records.map((record) => record.events),
    };
}"""
DRAWN = "document.querySelector('[data-testid=chart-latency]').data"


def nearest_rank(numbers: list[float], share: float) -> float | None:
    return sorted(numbers)[math.ceil(share * len(numbers)) - 1] if numbers else None


def reckon(records: list[list[dict[str, Any]]]) -> tuple[list, list]:
    """First tokens as [record, sequence, ms], and inter-token percentiles after each record, from lists of times."""
    clock, gaps, asked, firsts, percentiles = 0.0, [], {}, [], []
    request_of: dict[int, str] = {}
    times: dict[int, list[float]] = {}  # sequence → times of its tokens
    for number, record in enumerate(records):
        sampled: list[int] = []
        for event in map(event_from_dict, record):
            match event.type:
                case "request_added":
                    asked[event.request_id] = clock
                    request_of.update(dict.fromkeys(event.seq_ids, event.request_id))
                case "forked":
                    times[event.child] = list(times.get(event.parent, []))
                    request_of.setdefault(event.child, request_of[event.parent])
                case "sampled":
                    sampled.append(event.seq_id)
                case "step_finished":
                    clock += 1000 * event.seconds
                    for seq_id in sampled:
                        if request_of[seq_id] in asked:
                            firsts.append([number, seq_id, clock - asked.pop(request_of[seq_id])])
                        before = times.setdefault(seq_id, [])
                        gaps += [clock - before[-1]] if before else []
                        before.append(clock)
        percentiles.append([nearest_rank(gaps[-RECENT:], share) for share in (0.5, 0.95, 0.99)])
    return firsts, percentiles


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_the_latencies_of_what_is_shipped(path: Path, launching: Callable[..., Visualizer], pages: Any) -> None:
    page = pages.open(launching(replay=path))
    told = page.evaluate(READ)
    firsts, percentiles = reckon(told["records"])
    assert [first[:2] for first in told["firsts"]] == [first[:2] for first in firsts] and firsts
    assert [first[2] for first in told["firsts"]] == pytest.approx([first[2] for first in firsts])
    assert len(percentiles) == len(told["percentiles"]) and percentiles[-1][0] is not None
    for mine, theirs in zip(percentiles, told["percentiles"], strict=True):
        assert theirs == pytest.approx(mine) if mine[0] is not None else theirs == [None] * 3
    assert all(p50 <= p95 <= p99 for p50, p95, p99 in told["percentiles"] if p50 is not None)


def test_the_chart_shows_waiting_and_not_the_pages_pauses(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    page.click("[data-testid=tab-latency]")
    submit(visualizer, STORIES[:1])
    steps(visualizer, 12)
    caught_up(page, visualizer)
    page.wait_for_timeout(1200)  # a pause of the engine, which must not count as latency
    submit(visualizer, STORIES[1:])
    steps(visualizer, 12)
    caught_up(page, visualizer)
    page.wait_for_function(f"{DRAWN}?.[0].x.length === 3")
    told = page.evaluate(READ)
    step_ms = [1000 * e["seconds"] for record in told["records"] for e in record if e["type"] == "step_finished"]
    assert told["firsts"][0][2] == pytest.approx(step_ms[0])
    assert [first[2] for first in told["firsts"][1:]] == pytest.approx([step_ms[12]] * 2)
    assert page.evaluate(f"[...{DRAWN}[0].y]") == pytest.approx([first[2] for first in told["firsts"]])
    assert page.evaluate(f"[...{DRAWN}[0].text]") == ["A", "B", "F"]
    last = told["percentiles"][-1]
    page.wait_for_function(  # charts are drawn a few times per second
        f"(last) => last.every((ms, i) => Math.abs({DRAWN}[i + 1].y.at(-1) - ms) < 1e-6)", arg=last
    )
    words = page.text_content("[data-testid=chart-now]")
    assert "median of 3" in words and f"{last[0]:.1f} ms (p50)" in words

    # Before the second batch arrives, there is only one first token.
    page.evaluate("minipaged.player.seek(8)")
    page.locator("[data-testid=chart-now]").filter(has_text="median of 1").wait_for()
    # A new run starts without data.
    visualizer.thread.reset().result(20)
    page.evaluate("minipaged.player.live()")
    page.wait_for_function("!document.querySelector('[data-testid=chart-now]').textContent.includes('median')")
