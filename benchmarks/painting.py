"""What the page paints: 256 blocks, 9 sequences, 20 steps per second; and whether its memory stays flat.

    python benchmarks/painting.py [--seconds 60]

Needs playwright and a Chromium. Counts, in the page, the animation frames and the different moments drawn in them.
"""

from __future__ import annotations

import argparse
import shutil
import socket
from typing import Any

from playwright.sync_api import sync_playwright

from minipaged import LLM
from visualizer.app import launch
from visualizer.scenarios import Arrival

COUNT = """(seconds) => new Promise((done) => {
    const { player } = minipaged, started = performance.now(), from = player.position;
    const seen = new Set();
    let frames = 0;
    const frame = (now) => {
        frames += 1;
        seen.add(player.position);
        if (now - started < 1000 * seconds) requestAnimationFrame(frame);
        else done({
            frames: frames / seconds, moments: (seen.size - 1) / seconds,
            steps: (player.position - from) / seconds, nodes: document.querySelectorAll("*").length,
        });
    };
    requestAnimationFrame(frame);
})"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    llm = LLM("tiny", num_blocks=256, max_num_seqs=9)
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
        for number in range(9 * (1 + options.seconds * 20 // 380)):
            visualizer.thread.submit(Arrival(0, f"One day, a fox met {number} owls.", max_tokens=380)).result(30)
        page.wait_for_function("minipaged.player.position > 60")
        probe_ = page.context.new_cdp_session(page)
        for _ in range(options.seconds // 10):
            told = page.evaluate(COUNT, 10)
            print(
                f"{told['frames']:5.1f} frames/s  {told['moments']:5.1f} moments/s  {told['steps']:5.1f} steps/s  "
                f"{told['nodes']} nodes  heap {heap(probe_):.1f} MB"
            )
        browser.close()
    visualizer.close()


def heap(session: Any) -> float:
    """Megabytes of the page's JavaScript that are in use after a collection."""
    session.send("HeapProfiler.collectGarbage")
    return session.send("Runtime.getHeapUsage")["usedSize"] / 1e6


if __name__ == "__main__":
    main()
