"""Connects the server's event loop with the engine's thread: admits requests and routes outputs to them."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from minipaged.config import SamplingParams
from minipaged.engine_thread import EngineLoop
from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.events import Admitted, Event
from minipaged.outputs import RequestOutput
from minipaged.server.counters import Metrics
from minipaged.server.protocol import ApiError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The server's limits, for one client or all together. Times are seconds.

    Attributes:
        max_body: bytes of a request.
        max_concurrent: HTTP requests that the engine processes at once; beyond it 429. Connections, including idle
            ones, are limited to `max_connections`; beyond it 503.
        max_queue: sequences in the waiting queue; beyond it 429.
        body_timeout: until a request's body has arrived.
        timeout: until a request is answered.
        write_timeout: until the connection of a client that reads nothing is closed.
        grace: for requests in flight to finish when the server is told to stop.
    """

    max_body: int = 1 << 20
    max_concurrent: int = 256
    max_queue: int = 128
    body_timeout: float = 30.0
    timeout: float = 600.0
    write_timeout: float = 30.0
    grace: float = 10.0

    @property
    def max_connections(self) -> int:
        return 2 * self.max_concurrent + 64  # room for rejected requests, health checks and the page

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in ("max_queue", "grace")):
                raise InvalidConfig(f"{name} is too small: {value}")


class Job:
    """The engine's requests that one HTTP request asks for, one for each prompt.

    It holds only their newest outputs, because an output includes all earlier tokens. So a client that reads slowly
    gets larger chunks, needs no extra memory, and delays no other client.
    """

    def __init__(self, prompts: int) -> None:
        self.ids = [f"req-{uuid.uuid4().hex}" for _ in range(prompts)]
        self.cached: dict[str, int] = {}  # of each prompt that was admitted: its tokens from the prefix cache
        self.failed: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self._new: dict[str, RequestOutput] = {}
        self._news = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._new[output.request_id] = output
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """Ends the job with an error; the first one counts."""
        if not self.failed.done():
            self.failed.set_result(error)
        self._news.set()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields (prompt number, its newest output) until all are finished. Raises `ApiError`."""
        left = set(self.ids)
        while left:
            await self._news.wait()
            self._news.clear()
            if self.failed.done():
                raise self.failed.result()
            new, self._new = self._new, {}
            for request_id, output in new.items():
                if output.finished:
                    left.discard(request_id)
                yield self.ids.index(request_id), output


class Service:
    """Admits requests to the engine and delivers outputs, in one event loop. The caller starts and stops ``thread``."""

    def __init__(self, thread: EngineLoop, model: str, limits: Limits, metrics: Metrics) -> None:
        self.thread, self.model, self.limits, self.metrics = thread, model, limits, metrics
        self.draining = False
        self._jobs: dict[str, Job] = {}
        self._busy = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="minipaged-tokenizer")

    def open(self) -> None:
        """Call this in the event loop that the service will use."""
        self._loop = asyncio.get_running_loop()
        self.metrics.watch(self.thread)
        self._unsubscribe = self.thread.engine.events.subscribe(self._saw)
        self.thread.listen(self)

    def close(self) -> None:
        self.thread.listen(None)
        self._unsubscribe()
        self._tokenizing.shutdown(wait=False)

    def drain(self) -> None:
        """Rejects new requests; those in flight may finish within the grace period."""
        self.draining = True
        asyncio.get_running_loop().call_later(self.limits.grace, self.lost_here, "the server is shutting down", 503)

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Counts an HTTP request while it is served. Raises `ApiError` 429 above the limit, 503 while draining."""
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        if self._busy >= self.limits.max_concurrent:
            raise overloaded()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def tokenize(self, function: Callable[[], T]) -> T:
        """Runs a slow function that is not thread-safe, such as tokenizing, in one thread beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)

    @asynccontextmanager
    async def job(self, prompts: list[list[int]], params: SamplingParams) -> AsyncIterator[Job]:
        """Queues all prompts or none. Leaving the context aborts unfinished requests.

        Raises `InvalidRequest` if the request can never be served, `ApiError` 429 while too many wait. After the
        timeout the job fails with 504; asyncio.timeout would not do, as it binds to one task and streams use two.
        """
        job, seconds = Job(len(prompts)), self.limits.timeout
        added: asyncio.Future[None] | None = None
        too_late = ApiError(504, f"this took more than {seconds:g} seconds", code="timeout")
        deadline = asyncio.get_running_loop().call_later(seconds, job.fail, too_late)
        self._jobs |= dict.fromkeys(job.ids, job)  # before the call: outputs may arrive before `_add` returns
        try:
            added = asyncio.wrap_future(self.thread.call(lambda: self._add(job.ids, prompts, params)))
            await asyncio.wait((added, job.failed), return_when=asyncio.FIRST_COMPLETED)
            if not added.done():  # the job failed while the engine was still in a long step
                raise job.failed.result()
            added.result()
            yield job
        finally:
            deadline.cancel()
            if added is not None:
                added.cancel()  # no effect once it is done
            open_ = [request_id for request_id in job.ids if self._jobs.pop(request_id, None)]
            for request_id in open_:
                self.thread.abort(request_id)  # no effect on finished requests

    # --- in the engine's thread -----------------------------------------------------------------------------

    def _add(self, ids: list[str], prompts: list[list[int]], params: SamplingParams) -> None:
        engine, scheduler = self.thread.engine, self.thread.engine.scheduler
        wanted, capacity = len(prompts) * params.n, engine.config.max_num_seqs + self.limits.max_queue
        if wanted > capacity:
            raise InvalidRequest(f"this asks for {wanted} sequences; {capacity} are the most at a time")
        # The limit covers running and waiting sequences together: the next step may admit many that wait now.
        kept = (request for stage in scheduler.stages for request in stage.requests())
        unfinished = [*scheduler.running, *scheduler.waiting, *kept]
        if wanted + sum(request.width for request in unfinished) > capacity:
            raise overloaded()
        try:
            for request_id, prompt in zip(ids, prompts, strict=True):
                engine.add_request(request_id, prompt, params)
        except BaseException:
            for request_id in ids:
                engine.abort(request_id)
            raise

    def _saw(self, event: Event) -> None:
        if isinstance(event, Admitted) and (job := self._jobs.get(event.request_id)):
            job.cached.setdefault(event.request_id, event.num_cached)  # after a preemption it is admitted again

    def delivered(self, outputs: list[RequestOutput], why: str | None = None) -> None:
        self._hand_over(self._sort, outputs, why)

    def lost(self, why: str) -> None:
        self._hand_over(self.lost_here, why)

    def _hand_over(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed, so no job waits any longer
            log.debug("dropped outputs that arrived after the server had stopped")

    # --- in the event loop ----------------------------------------------------------------------------------

    def _sort(self, outputs: list[RequestOutput], why: str | None) -> None:
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue  # its client has disconnected
            if output.error is not None and why is None:
                job.fail(ApiError(500, str(output.error), code="request_failed"))
            elif output.error is not None or any(out.finish_reason == "abort" for out in output.outputs):
                job.fail(ApiError(500, why or "the request was aborted", code="aborted"))
            else:
                job.put(output)

    def lost_here(self, why: str, status: int = 500) -> None:
        """Ends every job with an error."""
        for job in set(self._jobs.values()):
            job.fail(ApiError(status, why, code="aborted"))


def overloaded() -> ApiError:
    return ApiError(429, "too many requests are waiting already; try again in a moment", code="overloaded")
