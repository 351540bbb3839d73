"""Batches on a real Ray cluster of two nodes with a worker each: every request is answered once, even if one dies."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
pytest.importorskip("pydantic", reason="the server's extra is not installed: pip install fastapi uvicorn")
import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from minipaged.errors import ModelError, WorkerFailed  # noqa: E402
from minipaged.offline_batch import open_batch, write  # noqa: E402
from minipaged.offline_batch_ray import answers  # noqa: E402
from tests.server.test_batch import check, fake_llm, files  # noqa: E402, F401


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "object_store_memory": 10**8}
        nodes = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        nodes.add_node(**node)
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield
        ray.shutdown()
        nodes.shutdown()


def logging_llm(log: Path) -> Any:
    """An LLM that logs the prompts that each node gets."""
    llm = fake_llm()
    add = llm.engine.add_request

    def add_request(request_id: str, prompt: list[int], params: Any) -> None:
        with open(log / ray.get_runtime_context().get_node_id(), "a") as file:
            file.write(f"{prompt[0]}\n")
        add(request_id, prompt, params)

    llm.engine.add_request = add_request
    return llm


def dying_llm(out: Path, died: Path) -> Any:
    """An LLM; the first process to reach step 20 kills itself, after some answers were written."""
    llm = fake_llm(max_num_seqs=2)
    step, steps = llm.engine.step, count()

    def dying_step() -> Any:
        if next(steps) == 20:
            deadline = time.monotonic() + 60
            while not out.stat().st_size and time.monotonic() < deadline:
                time.sleep(0.01)  # answers are written while others are computed
            try:
                died.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return step()

    llm.engine.step = dying_step
    return llm


def no_llm() -> Any:
    raise ModelError("there is no such model")


def run(load: Any, tasks: list[Any], out: Path) -> None:
    write(answers(load, tasks, "cpu"), out, lambda done: None)


def test_two_workers_answer_everything_and_prompts_that_begin_alike_go_to_one(files, tmp_path) -> None:  # noqa: F811
    log = tmp_path / "log"
    log.mkdir()
    run(partial(logging_llm, log), open_batch(*files), files[1])
    check(files[1])
    first, second = ([line for line in file.read_text().split()] for file in log.iterdir())
    assert len(first) + len(second) == 50
    assert not set(first) & set(second), "prompts with the same first token are on both nodes"


def test_a_worker_dies_and_the_same_command_goes_on(files, tmp_path) -> None:  # noqa: F811
    path, out = files
    with pytest.raises(WorkerFailed, match="run the same command again"):
        run(partial(dying_llm, out, tmp_path / "died"), open_batch(path, out), out)
    left = open_batch(path, out)
    assert 0 < len(left) < 50
    run(fake_llm, left, out)
    check(out)
    run(no_llm, open_batch(path, out), out)  # no request is left, so no worker starts


def test_a_model_that_cannot_be_loaded_is_said_in_one_line(files) -> None:  # noqa: F811
    with pytest.raises(WorkerFailed, match="there is no such model") as failed:
        run(no_llm, open_batch(*files), files[1])
    assert "\n" not in str(failed.value)
    assert len(open_batch(*files)) == 50
