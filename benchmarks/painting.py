"""Measures the page's frame rate and memory growth with 256 blocks, 9 sequences and 20 steps per second.

    python -m benchmarks.painting [--seconds 160]

Needs playwright and a Chromium. Each round of ten seconds counts, in the page, the different moments drawn, and then
measures the heap after a garbage collection. The number of moments depends on the machine's other load (``busy`` in the
result); the heap does not. ``main_ms``: the CPU milliseconds of the page's main thread per moment, and how many of them
are scripts, styles and layout; the rest is mostly painting.

A page keeps 1,200 records to rewind to, a minute at this rate. So the heap is compared between the round in which this
history is full and a minute later. ``flat``: it grew by ``BOUND`` at most. Writes results/painting.json.
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
TOKENS = 380  # of each sequence
ROUND = 10  # seconds
FULL = 1000  # records; at 1,200 the page drops the oldest 200
LATER = 60  # seconds
BOUND = 2.0  # MB; most growth of the heap in LATER seconds, once the history is full

COUNT = """(seconds) => new Promise((done) => {
    const { player } = minipaged, from = player.position;
    const seen = new Set();
    // Drawn in this frame; painted when the next frame begins.
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

THREAD = {"all": "Task", "script": "Script", "style": "RecalcStyle", "layout": "Layout"}  # names of Chromium's metrics


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
    """The measurements of each round of ten seconds."""
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
    """Keeps nine sequences running and nine waiting."""
    scheduler = visualizer.thread.engine.scheduler
    while len(scheduler.waiting) < SEQUENCES:
        visualizer.thread.submit(Arrival(0, "One day, a fox met an owl.", max_tokens=TOKENS)).result(30)


def main_thread(session: Any) -> dict[str, float]:
    """CPU milliseconds of the page's main thread so far, in total and by kind."""
    told = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    return {name: 1000 * told[f"{metric}Duration"] for name, metric in THREAD.items()}


def heap(session: Any) -> float:
    """Megabytes of the page's JavaScript heap in use after a garbage collection."""
    session.send("HeapProfiler.collectGarbage")
    return session.send("Runtime.getHeapUsage")["usedSize"] / 1e6


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The moments per second, and the heap when the history was full and a minute later."""
    full = next((number for number, told in enumerate(rounds) if told["records"] >= FULL), len(rounds))
    later = full + LATER // ROUND
    if later >= len(rounds):
        raise SystemExit(f"the history was full too late to watch the heap for {LATER} s; give more --seconds")
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
