"""What the page paints: 256 blocks, 9 sequences, 20 steps per second; and whether its memory stays flat.

    python -m benchmarks.painting [--seconds 160]

Needs playwright and a Chromium. Counts, in the page, the different moments drawn, ten seconds at a time, and after each
ten the heap once garbage is collected. How many moments are drawn depends on what else the machine does (``busy`` in
the result); the heap does not. ``main_ms``: the milliseconds that the page's main thread computes for a moment, by its
own clock, and what part of them goes to scripts, styles and layout; the rest is painting and all else.

A page keeps 1,200 records to rewind to, a minute at this rate. So memory is compared from when that history is full to
a minute later, each time after a collection. ``flat``: it grew by ``BOUND`` at most. Writes results/painting.json.
"""

from __future__ import annotations

import argparse
import shutil
import socket
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks.result_files import write
from minipaged import LLM
from visualizer.app import Visualizer, launch
from visualizer.scenarios import Arrival

SEQUENCES = 9
TOKENS = 380  # of each text
ROUND = 10  # seconds
FULL = 1000  # records: at 1,200 the oldest 200 are forgotten
LATER = 60  # seconds
BOUND = 2.0  # megabytes that the heap may grow by in that time, once the history is full

COUNT = """(seconds) => new Promise((done) => {
    const { player } = minipaged, from = player.position;
    const seen = new Set();
    // Drawn in this frame, and painted once the next one begins.
    const watch = new MutationObserver(() => {
        const { position } = player;
        requestAnimationFrame(() => seen.add(position));
    });
    watch.observe(document.querySelector("[data-step]"), { attributeFilter: ["data-step"] });
    setTimeout(() => {
        watch.disconnect();
        done({
            moments: seen.size / seconds, steps: (player.position - from) / seconds,
            nodes: document.querySelectorAll("*").length, records: player.records.length,
        });
    }, 1000 * seconds);
})"""

THREAD = {"all": "Task", "script": "Script", "style": "RecalcStyle", "layout": "Layout"}  # as in Chromium's metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=160)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    llm = LLM("tiny", num_blocks=256, max_num_seqs=SEQUENCES)
    llm.engine.eos_token_ids = frozenset()
    visualizer = launch(llm, port=port, scenario=None, rate=20, block=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(visualizer.url)
        page.wait_for_function("window.minipaged && minipaged.player.run")
        rounds = measure(visualizer, page, options.seconds)
        version = browser.version
        browser.close()
    visualizer.close()
    result = {"chromium": version, "rounds": rounds} | summary(rounds)
    write("painting", result, f"python -m benchmarks.painting --seconds {options.seconds}")


def measure(visualizer: Visualizer, page: Any, seconds: int) -> list[dict[str, Any]]:
    """A dictionary for each ten seconds."""
    feed(visualizer)
    page.wait_for_function("minipaged.player.position > 60")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    rounds = []
    for number in range(seconds // ROUND):
        feed(visualizer)
        before = main_thread(session)
        told = {name: round(value, 1) for name, value in page.evaluate(COUNT, ROUND).items()}
        moments = max(1.0, told["moments"] * ROUND)
        spent = {name: round((now - before[name]) / moments, 1) for name, now in main_thread(session).items()}
        rounds.append({"from_s": number * ROUND} | told | {"main_ms": spent, "heap_mb": round(heap(session), 1)})
        print(rounds[-1], flush=True)
    return rounds


def feed(visualizer: Visualizer) -> None:
    """Nine texts run at any time, and as many wait."""
    scheduler = visualizer.thread.engine.scheduler
    while len(scheduler.waiting) < SEQUENCES:
        visualizer.thread.submit(Arrival(0, "One day, a fox met an owl.", max_tokens=TOKENS)).result(30)


def main_thread(session: Any) -> dict[str, float]:
    """Milliseconds that the page's main thread has computed so far, in all and of some kinds."""
    told = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    return {name: 1000 * told[f"{metric}Duration"] for name, metric in THREAD.items()}


def heap(session: Any) -> float:
    """Megabytes of the page's JavaScript that are in use after a collection."""
    session.send("HeapProfiler.collectGarbage")
    return session.send("Runtime.getHeapUsage")["usedSize"] / 1e6


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The heap in the first round in which the history was full, and a minute later."""
    full = next((number for number, told in enumerate(rounds) if told["records"] >= FULL), len(rounds))
    later = full + LATER // ROUND
    if later >= len(rounds):
        raise SystemExit(f"the history was full too late to watch the heap for {LATER} s: give more --seconds")
    heaps = [told["heap_mb"] for told in rounds]
    grown = heaps[later] - heaps[full]
    moments = sorted(told["moments"] for told in rounds)
    return {
        "moments_per_s": {"min": moments[0], "median": moments[len(moments) // 2], "max": moments[-1]},
        "main_ms_median": {name: sorted(told["main_ms"][name] for told in rounds)[len(rounds) // 2] for name in THREAD},
        "history_full_from_s": rounds[full]["from_s"],
        "heap_mb": {"first_round": heaps[0], "history_full": heaps[full], f"{LATER}_s_later": heaps[later]},
        "growth_mb": round(grown, 1),
        "bound_mb": BOUND,
        "flat": grown <= BOUND,
    }


if __name__ == "__main__":
    main()
