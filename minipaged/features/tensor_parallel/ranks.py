"""The processes of tensor parallelism: how they find each other, and how plans reach them.

Plans travel through gloo, and so do sums on a CPU; sums over GPUs go through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from minipaged.core.plan import StepPlan
from minipaged.errors import InvalidConfig, MinipagedError, WorkerFailed
from minipaged.execution.runner import WrappedRunner
from minipaged.features.tensor_parallel.shard import Shard, connected

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # rank 0 may be idle for long; if it ends, the others notice at once
_groups = count()


class PlainSequence(NamedTuple):
    """The part of a sequence that `build_batch` needs."""

    num_prompt: int = 0


class PlainChunk(NamedTuple):
    """The part of a chunk that `build_batch` needs: a worker has no requests and no sequences."""

    start: int
    num_tokens: int
    num_rows: int
    token_ids: list[int]
    block_table: list[int]
    seq: PlainSequence = PlainSequence()


def plain(plan: StepPlan) -> StepPlan:
    """The plan for a worker. It requests no logits: rank 0 has them all."""
    chunks: list[Any] = [
        PlainChunk(c.start, c.num_tokens, 0, c.token_ids, c.block_table, PlainSequence(c.seq.num_prompt))
        for c in plan.chunks
    ]
    return StepPlan(plan.step, chunks, plan.swap_outs, plan.swap_ins, plan.copies)


class LeadingRunner(WrappedRunner):
    """Rank 0's runner: sends each plan to the other ranks, and executes it too."""

    has_part_of_the_heads = True
    in_step = False  # if True between steps, the last step failed and the state of the other ranks is unknown

    def execute(self, plan: StepPlan) -> Any:
        if self.in_step:
            raise WorkerFailed("an earlier step broke off, and the processes are out of step since; start them again")
        self.in_step = True
        broadcast(plain(plan))
        logits = self.inner.execute(plan)
        self.in_step = False
        return logits


def broadcast(plan: StepPlan | None) -> StepPlan | None:
    """Sends rank 0's plan to every rank; returns it on each of them."""
    box = [plan]
    with connected():
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def process_group() -> Iterator[Shard]:
    if "RANK" not in os.environ:
        raise InvalidConfig("tensor parallelism needs several processes: torchrun --nproc-per-node 2 …")
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(f"minipaged-{next(_groups)}", store)  # the store keeps the addresses of earlier groups
    nccl = dist.is_nccl_available() and torch.cuda.is_available()  # a build for CUDA has NCCL on any machine
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Shard(rank, world)
    finally:
        dist.destroy_process_group()


def check(config: Any, device: torch.device) -> None:
    """Raises `InvalidConfig` for settings that several processes do not support; selects this rank's GPU."""
    if config.memory == "vattention" or config.cuda_graphs or device.type == "mps":
        raise InvalidConfig('tensor parallelism excludes memory="vattention", cuda_graphs=True and device="mps"')
    if config.drafts_with_model:
        raise InvalidConfig('tensor parallelism excludes a draft model; use speculate="prompt-lookup"')
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise InvalidConfig(f"each process needs its own GPU; this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def neighbours(device: torch.device) -> int:
    """Number of processes that share a device's memory: on a CPU all those of this machine."""
    return 1 if device.type == "cuda" else int(os.environ["LOCAL_WORLD_SIZE"])


def gather(value: T) -> list[T]:
    """The value of every process, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    with connected():
        dist.all_gather_object(values, value)
    return values


def on_all_ranks(do: Callable[[], T]) -> T:
    """Calls ``do`` on every rank. Re-raises any rank's error on every rank, so that none deadlocks."""
    failed: MinipagedError | None = None
    try:
        result = do()
    except MinipagedError as error:
        failed = error
    for failure in filter(None, gather(failed)):
        raise failure
    return result
