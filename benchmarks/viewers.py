"""What viewers cost the engine: steps per second with none of them, and with 30 who watch.

    python benchmarks/viewers.py [--viewers 30] [--seconds 8]

The viewers are a process of their own that pulls as a page does: one after the other, from where it has got to. The
two rates are measured in turns, so that a machine that is busy otherwise is unfair to both.
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
        command = [sys.executable, __file__, "--watch", visualizer.url, "--viewers", str(options.viewers)]
        viewers = subprocess.Popen(command)
        time.sleep(3)  # until all have arrived
        watched.append(rate(visualizer, options.seconds))
        viewers.terminate()
        viewers.wait()
    visualizer.close()
    # By the clock is what users feel; by the process's CPU time is what can be told on a busy machine.
    for unit, name in enumerate(("second", "CPU second of the server")):
        ratio = median(w[unit] / a[unit] for a, w in zip(alone, watched, strict=True))
        print(f"steps per {name}, alone: {', '.join(f'{r[unit]:.1f}' for r in alone)}")
        print(f"    with {options.viewers} viewers: {', '.join(f'{r[unit]:.1f}' for r in watched)}")
        print(f"    ratio: {ratio:.3f} (the viewers cost {100 * (1 - ratio):.0f} %)")


def rate(visualizer: Visualizer, seconds: float) -> tuple[float, float]:
    """Steps per second and per CPU second, with nine sequences that never end."""
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
