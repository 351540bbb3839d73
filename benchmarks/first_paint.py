"""Measures the page's load time: from navigation until the scene is painted.

    python -m benchmarks.first_paint [--rounds 7]

Every round uses a browser with an empty cache; the server shows the opening scenario, and has served no page before the
first round. ``scene_s``: the pool's blocks are in the page and a frame with them has been painted. ``charts_s``: plotly
has drawn the first chart. Both in seconds since navigation started, by the page's own clock. Writes
results/first_paint.json. Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import socket
from statistics import median

from playwright.sync_api import sync_playwright

from benchmarks.result_files import write
from visualizer.app import launch

GOAL = 3.0  # seconds until the scene is painted

# Installed before the page's own scripts.
WATCH = """
window.painted = {};
const look = () => {
    const { painted } = window;
    const scene = document.querySelectorAll("[data-testid=block]").length;
    const chart = document.querySelector("[data-testid=chart] svg.main-svg");
    const now = () => performance.now() / 1000;
    // The frame after this callback paints it, so take the time in the callback of the next frame.
    if (scene && !painted.scene) requestAnimationFrame(() => (painted.scene ??= now()));
    if (chart && !painted.charts) requestAnimationFrame(() => (painted.charts ??= now()));
    if (!painted.charts) requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    visualizer = launch(port=port, block=False)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        rounds = []
        for _ in range(options.rounds):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.add_init_script(WATCH)
            page.goto(visualizer.url, wait_until="commit")
            page.wait_for_function("window.painted?.charts", timeout=60_000)
            rounds.append(page.evaluate("painted"))
            print({name: round(value, 2) for name, value in rounds[-1].items()}, flush=True)
            version = browser.version
            browser.close()
    visualizer.close()
    result = {"chromium": version, "goal_s": GOAL}
    for name in ("scene", "charts"):
        times = sorted(round(told[name], 2) for told in rounds)
        result[f"{name}_s"] = {"first": round(rounds[0][name], 2), "median": median(times), "all": times}
    result["within_goal"] = result["scene_s"]["median"] <= GOAL
    write("first_paint", result, f"python -m benchmarks.first_paint --rounds {options.rounds}")


if __name__ == "__main__":
    main()
