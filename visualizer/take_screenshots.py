"""Takes the README's screenshots of the page while the opening scenario runs.

    python -m visualizer.take_screenshots

Needs playwright (Python package) and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from visualizer.app import launch

FOLDER = Path(__file__).with_name("screenshots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--port", type=int, default=7869)
    options = parser.parse_args()
    visualizer = launch(port=options.port, block=False)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(visualizer.url)
        for picture in (copy_on_write, pool_full, waste, attention):
            picture(page)
            path = options.out / f"{picture.__name__}.png"
            page.screenshot(path=path)
            print(f"{path}: {path.stat().st_size // 1024} kB")
        browser.close()
    visualizer.close()


def copy_on_write(page: Any) -> None:
    """The view pauses for a second at a copy-on-write, long enough for the screenshot."""
    page.wait_for_function("window.minipaged?.player.current?.mark === 'copied'", timeout=60_000)
    page.wait_for_timeout(400)


def pool_full(page: Any) -> None:
    page.wait_for_function("window.minipaged.player.current?.mark === 'preempted'", timeout=60_000)
    page.wait_for_timeout(400)


def waste(page: Any) -> None:
    page.click("[data-testid=view-freeze]")
    page.click("[data-testid=tab-waste]")
    page.locator("[data-testid=waste-say]").filter(has_text="what paging holds").wait_for()


def attention(page: Any) -> None:
    """The attention of one of the newest tokens of the first sequence."""
    page.click("[data-testid=engine-pause]")
    page.click("[data-testid=view-live]")
    page.click("[data-testid=tab-memory]")
    page.click("[data-testid=sequence] .mp-badge")
    page.wait_for_selector("[data-testid=runs] [data-go^='token:']")
    page.locator("[data-testid=runs] [data-go^='token:']").all()[-3].click()
    page.wait_for_selector("[data-testid=attention-block]", timeout=30_000)


if __name__ == "__main__":
    main()
