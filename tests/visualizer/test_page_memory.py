"""The page's memory is bounded (records, keyframes, points of charts), and compressed events do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.visualizer.test_page import STORIES, caught_up, recorded, steps, submit
from visualizer.app import Visualizer

MOST = 1200  # records


def test_events_are_the_same_after_a_garbage_collection(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, STORIES)
    steps(visualizer, 30)
    caught_up(page, visualizer)
    page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
    _, records = recorded(visualizer)
    assert page.evaluate("minipaged.player.records.map((record) => record.events)") == records
    same = "(() => { const [r] = minipaged.player.records; return r.events === r.events; })()"
    assert page.evaluate(same), "events must keep their identity"


def test_what_is_kept_has_an_end(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, STORIES[:1])
    steps(visualizer, 5)
    caught_up(page, visualizer)
    # Ignores the server's records, because the records below are made up.
    page.evaluate("minipaged.player.receive = () => {}")
    for tab in ("throughput", "latency", "waste"):
        page.click(f"[data-testid=tab-{tab}]")
        # Made-up steps of one token; the engine is paused, so no real ones come in between.
        page.evaluate("""() => { const { player } = minipaged;
            for (let i = 0; i < 700; i += 1) {
                const step = player.head.step + 1;
                const done = { type: "step_finished", step, num_tokens: 1, seconds: 0.01 };
                player.ingest([{ type: "step_started", step }, done]);
            }
            player.live(); }""")
        page.wait_for_function("""() => { const { charts, player } = minipaged;
            const { accounts } = charts.views.waste;
            return (charts.shown === "waste" ? accounts.end : charts.history.end) === player.end; }""")
    kept = page.evaluate("""() => { const { player, charts } = minipaged; return {
        records: player.records.length, keyframes: player.keyframes.size, points: charts.history.points.length,
        rows: charts.views.waste.accounts.rows.length, gaps: charts.history.latency.gaps.length,
        drawn: Object.values(charts.views).flatMap(({ plot }) => plot.data ?? []).map(({ x }) => x.length),
    }; }""")
    assert MOST - 200 <= kept["records"] <= MOST and kept["keyframes"] <= 7, kept
    assert kept["points"] <= MOST + 700 and kept["rows"] <= MOST and kept["gaps"] <= 256, kept
    assert max(kept["drawn"]) <= 400, kept
