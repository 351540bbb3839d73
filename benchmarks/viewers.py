"""Measures how viewers of the page slow the engine: steps per second without viewers and with 30.

    python -m benchmarks.viewers [--viewers 30] [--seconds 8]

A separate process plays the viewers: like a page, each one pulls records again and again from its last position. The
two rates are measured in turns, so that other load affects both equally; what counts is their ratio. Writes
results/viewers.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from statistics import median
from typing import Any
from urllib.request import urlopen

import httpx

from benchmarks.result_files import write
from minipaged import LLM
from visualizer.app import Visualizer, launch
from visualizer.scenarios import Arrival

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        asyncio.run(watch(options.watch, options.viewers))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    llm = LLM("tiny", num_blocks=256, max_num_seqs=9, enable_prefix_caching=False)
    llm.engine.eos_token_ids = frozenset()
    visualizer = launch(llm, port=port, scenario=None, rate=None, block=False)
    alone, watched = [], []
    for _ in range(ROUNDS):
        alone.append(rate(visualizer, options.seconds))
        command = [sys.executable, "-m", "benchmarks.viewers", "--watch", visualizer.url]
        command += ["--viewers", str(options.viewers)]
        viewers = subprocess.Popen(command)
        time.sleep(3)  # until all viewers are connected
        watched.append(rate(visualizer, options.seconds))
        viewers.terminate()
        viewers.wait()
    visualizer.close()
    # Users notice steps per second; on a busy machine only steps per CPU second can be compared.
    result: dict[str, Any] = {"viewers": options.viewers, "rounds": ROUNDS, "seconds": options.seconds}
    for unit, name in enumerate(("second", "cpu_second_of_the_server")):
        ratios = sorted(round(w[unit] / a[unit], 3) for a, w in zip(alone, watched, strict=True))
        result[f"steps_per_{name}"] = {
            "alone": [round(told[unit], 1) for told in alone],
            "watched": [round(told[unit], 1) for told in watched],
            "ratios": ratios,
            "cost_percent": round(100 * (1 - median(ratios)), 1),
        }
    print(json.dumps(result, indent=1))
    write("viewers", result, f"python -m benchmarks.viewers --viewers {options.viewers} --seconds {options.seconds:g}")


def rate(visualizer: Visualizer, seconds: float) -> tuple[float, float]:
    """Steps per second and per CPU second, while nine sequences are always running."""
    scheduler = visualizer.thread.engine.scheduler

    def feed() -> None:
        while len(scheduler.waiting) + len(scheduler.running) < 12:
            visualizer.thread.submit(Arrival(0, "Once upon a time", max_tokens=200, seed=1)).result(30)

    feed()
    started, first, cpu = time.monotonic(), scheduler.step, time.process_time()
    while time.monotonic() - started < seconds:
        time.sleep(0.2)
        feed()
    steps = scheduler.step - first
    return steps / (time.monotonic() - started), steps / (time.process_time() - cpu)


async def watch(url: str, count: int) -> None:
    config = json.loads(urlopen(f"{url}/config").read())
    page = next(component["id"] for component in config["components"] if component["type"] == "html")
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=count)) as client:
        await asyncio.gather(*(viewer(client, url, page, number) for number in range(count)))


async def viewer(client: httpx.AsyncClient, url: str, page: int, number: int) -> None:
    cursor: dict[str, Any] = {"run": None, "cursor": 0, "status": -1}
    while True:
        body = {"session_hash": f"viewer-{number}", "component_id": page, "fn_name": "pull", "data": cursor}
        answer = (await client.post(f"{url}/gradio_api/component_server", json=body)).json()
        if "run" in answer:
            end = answer["first"] + len(answer["records"])
            cursor = {"run": answer["run"], "cursor": end, "status": answer["status_version"]}


if __name__ == "__main__":
    main()
