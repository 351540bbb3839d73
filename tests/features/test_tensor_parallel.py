"""Tensor parallelism with one scheduler and two processes: the test is rank 0, one worker is rank 1 in all tests."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import transformers

from minipaged import LLM, SamplingParams
from minipaged.config import EngineConfig
from minipaged.core.plan import StepPlan
from minipaged.errors import InvalidConfig, InvalidRequest, ModelError, StepFailed
from minipaged.events import Admitted, Copied, Preempted
from minipaged.execution import pool_size
from minipaged.features.attention_view import attention
from minipaged.features.tensor_parallel import ranks as tensor_parallel
from minipaged.features.tensor_parallel.launch import run
from minipaged.features.tensor_parallel.ranks import plain
from tests.checkpoints import save_llama
from tests.models.families import config_of, randomize

ROOT = Path(__file__).parent.parent.parent
LIMIT = timedelta(seconds=240)  # longest wait for the other process

WORKER = """
import json, sys
from minipaged.errors import MinipagedError
from minipaged.features.tensor_parallel.launch import run
for line in sys.stdin:
    model, settings = json.loads(line)
    try:
        outcome = run(None, model, **settings)
    except MinipagedError as error:
        outcome = type(error).__name__
    print(json.dumps(outcome), flush=True)
"""


class Worker:
    """Rank 1, in its own process."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._groups = itertools.count()
        self._env = {  # as torchrun sets it, whose store also outlives the groups
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=os.environ | self._env | {"RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, use, model, **settings):
        """Calls `tensor_parallel.run` on both ranks."""
        print(json.dumps([str(model), settings]), file=self.process.stdin, flush=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor_parallel, "_groups", self._groups)
            patch.setattr(tensor_parallel, "PATIENCE", LIMIT)
            for name, value in (self._env | {"RANK": "0", "LOCAL_RANK": "0"}).items():
                patch.setenv(name, value)
            return run(use, str(model), **settings)

    def outcome(self):
        """The last run's result on rank 1: ``None``, or the name of an error."""
        return json.loads(self.process.stdout.readline())

    def end(self):
        try:
            self.process.communicate(timeout=LIMIT.seconds)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def workers():
    workers = []
    yield workers
    for worker in workers:
        worker.end()


@pytest.fixture
def worker(workers):
    """The worker that tests share; a new one if it has died."""
    if not workers or workers[-1].process.poll() is not None:
        workers.append(Worker())
    return workers[-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoints of a Llama with grouped-query attention and of a GPT-2."""
    gpt2, directory = transformers.GPT2LMHeadModel(config_of("gpt2")), tmp_path_factory.mktemp("gpt2")
    randomize(gpt2)
    gpt2.save_pretrained(directory)
    return {"llama": save_llama(tmp_path_factory.mktemp("llama"), vocab_size=131), "gpt2": directory}


def work(llm):
    """Runs greedy, parallel and beam search on prompts with a shared prefix. Returns the tokens and block events."""
    events = []
    llm.engine.events.subscribe(events.append)
    prompts = [[*range(3, 20), *range(40 + 7 * i, 41 + 8 * i)] for i in range(6)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    asked = [
        *((prompt, greedy) for prompt in prompts),
        (prompts[5], SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)),
        (prompts[1], SamplingParams(temperature=0, beam_width=3, n=2, max_tokens=6)),
    ]
    outputs = llm.generate(*map(list, zip(*asked, strict=True)))
    llm.engine.check()
    tokens = [[completion.token_ids for completion in output.outputs] for output in outputs]
    preempted = [event.mode for event in events if isinstance(event, Preempted)]
    cached = sum(event.num_cached for event in events if isinstance(event, Admitted))
    return tokens, preempted, sum(isinstance(event, Copied) for event in events), cached


@pytest.mark.parametrize(("model", "preemption"), [("llama", "recompute"), ("gpt2", "swap")])
def test_two_processes_say_what_one_does(worker, checkpoint, model, preemption):
    settings = dict(num_blocks=16, block_size=4, max_num_seqs=4, max_num_batched_tokens=24, preemption=preemption)
    alone = LLM(str(checkpoint[model]), dtype="float32", **settings)
    expected = work(alone)
    assert set(expected[1]) == {preemption} and expected[2] and expected[3]  # preemptions, copies and hits occurred

    def use(llm):
        return work(llm), llm.engine.bytes_per_block

    happened, bytes_per_block = worker.run(use, checkpoint[model], dtype="float32", **settings)
    assert worker.outcome() is None
    assert happened == expected
    assert 2 * bytes_per_block == alone.engine.bytes_per_block


def test_the_pools_are_as_large_as_the_smallest(worker, checkpoint, monkeypatch):
    """All ranks use the smallest pool's size. On a CPU, a block takes memory on each rank."""
    asked = []

    def plenty(bytes_per_block, *_, **__):
        asked.append(bytes_per_block)
        return 10**6

    monkeypatch.setattr(pool_size, "blocks_that_fit", plenty)
    settings = {"num_blocks": 5, "block_size": 32}
    engine = worker.run(lambda llm: llm.engine, checkpoint["llama"], **settings)
    assert worker.outcome() is None
    assert engine.num_blocks == engine.runner.kv_cache.num_blocks == 5
    assert asked == [2 * engine.bytes_per_block]


def test_what_one_rank_refuses_all_refuse(worker, checkpoint, monkeypatch):
    def fits_not(*_, **__):
        raise InvalidConfig("too little memory here")

    with monkeypatch.context() as patch, pytest.raises(InvalidConfig, match="too little"):
        patch.setattr(pool_size, "blocks_that_fit", fits_not)
        worker.run(None, checkpoint["llama"])
    assert worker.outcome() == "InvalidConfig"
    with pytest.raises(ModelError, match="no directory"):
        worker.run(None, "/nowhere")
    assert worker.outcome() == "ModelError"
    with pytest.raises(InvalidConfig, match='excludes memory="vattention"'):
        worker.run(None, checkpoint["llama"], memory="vattention")
    assert worker.outcome() == "InvalidConfig"


def test_without_torchrun_there_are_no_processes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InvalidConfig, match="torchrun --nproc-per-node 2"):
        run(None)


def test_an_error_between_two_steps_lets_the_others_go(worker, checkpoint):
    def use(llm):
        with pytest.raises(InvalidConfig, match="one engine"):
            llm.build_engine(EngineConfig())
        llm.engine.add_request("watched", [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
        llm.engine.step()
        with pytest.raises(InvalidRequest, match="other processes have the other heads"):
            attention(llm.engine, 0, 1)
        llm.engine.step()
        return llm.engine.has_unfinished()

    assert worker.run(use, checkpoint["llama"]) is False
    assert worker.outcome() is None
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        worker.run(lambda llm: llm.generate([[]]), checkpoint["llama"])
    assert worker.outcome() is None


def test_ctrl_c_in_the_midst_of_a_step_lets_the_others_go(worker, checkpoint):
    """The other rank must not wait for rank 0's summand, and rank 0 cannot run another step."""

    def interrupted(*_):
        raise KeyboardInterrupt

    def use(llm):
        llm.generate([5, 6], SamplingParams(max_tokens=2))
        llm.engine.runner.model.layers[1].mlp.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.generate([5, 6])
        with pytest.raises(StepFailed, match="out of step since; start them again"):
            llm.generate([5, 6])

    worker.run(use, checkpoint["llama"])
    assert worker.outcome() == "WorkerFailed"


def test_the_worker_dies(worker, checkpoint):
    def use(llm):
        llm.generate([5, 6], SamplingParams(max_tokens=2))
        worker.process.kill()
        worker.process.wait()
        llm.generate([5, 6])

    with pytest.raises(StepFailed, match="another process of the group is gone"):
        worker.run(use, checkpoint["llama"])


def test_a_worker_is_told_all_that_a_plan_does():
    """A plan without vAttention's maps, which are rejected earlier, and preemptions, which only the scheduler uses."""
    sent = {"step", "chunks", "swap_outs", "swap_ins", "copies"}
    assert {field.name for field in fields(StepPlan)} == sent | {"maps", "preempted", "outgrown"}
    plan = StepPlan(7, [], [(1, 2)], [(3, 4)], [(5, 6)])
    assert plain(plan) == plan


def test_torchrun_generate():
    """Only rank 0 prints, and it prints one JSON object."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["-m", "minipaged", "generate", "Once upon a time", "--temperature", "0", "--max-tokens", "6", "--json"]
    done = subprocess.run(
        [*torchrun, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT.seconds, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (output,) = json.loads(done.stdout)["outputs"]
    alone = LLM("tiny").generate("Once upon a time", SamplingParams(temperature=0, max_tokens=6))
    assert output["token_ids"] == alone[0].outputs[0].token_ids
