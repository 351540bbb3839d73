"""Offline batch inference on several workers or machines, with Ray Data.

Each worker is an actor with its own LLM, which answers one part of the tasks (`offline_batch.partition`) in one
run of its engine. Only the driver writes the output, as without Ray: a killed run is resumed in the same way.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import ceil
from typing import Any

import pyarrow
import ray
import ray.data
from ray.exceptions import RayError

from minipaged import offline_batch
from minipaged.errors import WorkerFailed


class _Worker:
    """A worker: Ray Data creates one in each actor and calls it with its part of the tasks, a table of one row.

    The tasks that a lost worker had not answered are left to the next run. Ray itself would repeat the whole part and
    drop as many lines as it had already received, but lines come in no fixed order, so a worker refuses to repeat one.
    """

    def __init__(self, load: Callable[[], Any], schedule: str) -> None:
        if ray.get_runtime_context().was_current_actor_reconstructed:
            raise RuntimeError("its process died")
        self.llm, self.schedule = load(), schedule
        self.begun: set[str] = set()

    def __call__(self, part: pyarrow.Table) -> Iterator[pyarrow.Table]:
        tasks = [offline_batch.Task(**task) for task in json.loads(part["tasks"][0].as_py())]
        if tasks[0].custom_id in self.begun:
            raise RuntimeError("the connection to it was lost")
        self.begun.add(tasks[0].custom_id)
        for lines in offline_batch.answers(self.llm, tasks, self.schedule):
            yield pyarrow.table({"line": lines})


def answers(
    load: Callable[[], Any],
    tasks: list[offline_batch.Task],
    device: str,
    workers: int | None = None,
    schedule: str = "fcfs",
) -> Iterator[list[bytes]]:
    """Yields lines of the output as the workers finish tasks. ``load`` makes a worker's LLM, which uses ``schedule``.

    Uses the cluster that ``RAY_ADDRESS`` or ``ray start`` names, or else starts one on this machine. Raises
    `WorkerFailed`; the tasks not answered by then need another run.
    """
    if not tasks:
        return
    try:
        _start()
        workers, resources = _resources(device, workers)
        lines = _dataset({"load": load, "schedule": schedule}, offline_batch.partition(tasks, workers), resources)
        for block in lines.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield block["line"].to_pylist()
    except (RayError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise WorkerFailed(f"a worker or Ray failed: {reason}; run the same command again to continue") from error


def _start() -> None:
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports to Ray's developers
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # WorkerFailed has its last line


def _resources(device: str, workers: int | None) -> tuple[int, dict[str, float]]:
    """The number of workers, and what each of them reserves: a GPU or its share of a machine's cores."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if device != "cpu" and gpus:
        return workers or gpus, {"num_gpus": 1}
    workers = workers or max(1, len(machines))
    cores = min((machine["CPU"] for machine in machines), default=1) // ceil(workers / max(1, len(machines)))
    return workers, {"num_cpus": max(1, int(cores))}


def _dataset(
    worker: dict[str, Any], parts: list[list[offline_batch.Task]], resources: dict[str, float]
) -> ray.data.Dataset:
    rows = [{"tasks": json.dumps([asdict(task) for task in part])} for part in parts]
    parts_ = ray.data.from_items(rows, override_num_blocks=len(rows))
    parts_.context.enable_progress_bars = False
    parts_.context.target_max_block_size = 1  # bytes: so small that each line is sent at once
    return parts_.map_batches(
        _Worker,
        fn_constructor_kwargs=worker,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=len(rows), max_tasks_in_flight_per_actor=1),
        **resources,
    )
