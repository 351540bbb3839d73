"""Takes the picture that the README shows: the page at the moment when the pool is full and somebody must wait.

    python -m visualizer.take_screenshot

Needs playwright (Python package) and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from minipaged import LLM
from visualizer.app import launch
from visualizer.scenarios import DEMO_SETTINGS

PICTURE = Path(__file__).with_name("screenshot.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--port", type=int, default=7869)
    options = parser.parse_args()
    visualizer = launch(lambda: LLM(options.model, **DEMO_SETTINGS), port=options.port, block=False)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.goto(visualizer.url)
        # The view rests on a preemption for a moment, which is when to press the button.
        page.wait_for_function("window.minipaged?.player.current?.mark === 'preempted'", timeout=60_000)
        page.wait_for_timeout(400)
        page.screenshot(path=options.out)
        browser.close()
    visualizer.close()
    print(f"{options.out}: {options.out.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
