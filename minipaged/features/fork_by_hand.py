"""Forks a running request between two steps: the ``fork`` of the PagedAttention paper's §4.4, as a public call.

Adds `Engine.fork`. It uses `MemoryManager.prepare_fork` and the stages' hook ``forked``. Read `fork` first. The page
shows it when you press *Fork* on a sequence.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from minipaged.core.engine import Engine
from minipaged.core.request import Request, Status
from minipaged.core.scheduler import Scheduler
from minipaged.errors import InvalidRequest
from minipaged.events import Forked


def fork(engine: Engine, request_id: str, new_id: str | None = None) -> str:
    """Forks a running request into two that continue independently; returns the id of the copy.

    All blocks are shared until one of the two writes. The copy inherits the output so far and draws its own random
    numbers. Raises `InvalidRequest` for a request that is not running with exactly one sequence past its prompt, when
    ``max_num_seqs`` sequences run already, or when memory must be reserved for the copy and there is too little. The
    caller must step the engine too: an `LLM` does not know the copy.
    """
    parent, limit = engine.requests.get(request_id), engine.config.max_num_seqs
    single = parent is not None and parent.status is Status.RUNNING and len(parent.live) == 1
    if parent is None or not single or not parent.decoding.independent:
        raise InvalidRequest(f"{request_id!r} is not a running request with one sequence; only such can be forked")
    (seq,) = parent.live
    if seq.num_output == 0 or seq.num_computed < len(seq.tokens) - 1:
        raise InvalidRequest(f"{request_id!r} is still in prefill; fork it when it decodes")
    if sum(request.width for request in engine.scheduler.running) >= limit:
        raise InvalidRequest(f"max_num_seqs = {limit} sequences are running; fork again later")
    if new_id is None:
        engine.num_forks += 1  # ids are never reused: they seed the copies' random numbers
        new_id = f"{request_id}/fork-{engine.num_forks}"
    engine.check_id(new_id)
    getattr(engine.scheduler, "refuse_forks", lambda: None)()  # a scheduler of one's own may know none
    if not engine.memory.prepare_fork(seq.seq_id):
        raise InvalidRequest(f"there is no room for a copy of {request_id!r}; fork again when other requests end")
    params = replace(parent.params, n=1)
    child = seq.copy(engine.scheduler.next_seq_id(), Random(f"{engine.seed(params)}/{new_id}"))
    request = replace(
        parent,
        request_id=new_id,
        params=params,
        seqs=[child],
        arrival=engine.next_arrival(),
        decoding=engine.wings.decoding(params, parent.stop_token_ids),
        fork_at=len(parent.prompt_token_ids),
        prompt_logprobs=None if parent.prompt_logprobs is None else list(parent.prompt_logprobs),
    )
    start(engine.scheduler, parent, request)
    engine.requests[new_id] = request
    return new_id


def start(scheduler: Scheduler, parent: Request, child: Request) -> None:
    """Starts ``child``, a copy of a running request with one sequence, on the parent's blocks."""
    (old,), (new,) = parent.live, child.live
    scheduler.insert(child, scheduler.running, Status.RUNNING)
    scheduler.events.emit(Forked, old.seq_id, new.seq_id, child.request_id)
    scheduler.memory.fork(old.seq_id, new.seq_id)
    for stage in scheduler.stages:
        stage.forked(parent, child)
