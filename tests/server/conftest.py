"""Fixtures of the server tests: one small model for all; starting a server with a new engine takes milliseconds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from copy import copy
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from minipaged import LLM
from tests.checkpoints import save_llama
from tests.text.tokenizers_for_tests import byte_level

pytest.importorskip("fastapi", reason="the server's extra is not installed: pip install fastapi uvicorn")
from minipaged.server.run import Server, bind  # noqa: E402
from minipaged.server.service import Limits  # noqa: E402

PATIENCE = 60.0  # longest wait in seconds

HTTP = httpx2.Client(timeout=PATIENCE, verify=False)  # shared, because reading certificates takes longer than a request


def until(condition: Callable[[], Any], what: str = "it did not happen") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Runs ``work`` in a new thread, also for asyncio, because an event loop may run in this one."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def run_async(main: Coroutine[Any, Any, Any]) -> Any:
    return in_thread(lambda: asyncio.run(main)).result(PATIENCE)


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> LLM:
    """A random model, with a tokenizer and a chat template."""
    tokenizer = byte_level()
    directory = tmp_path_factory.mktemp("babbler")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 2048}
    save_llama(directory, vocab_size=len(tokenizer), **sizes, **ends)
    tokenizer.save_pretrained(directory)
    return LLM(str(directory), device="cpu", num_blocks=300, max_num_seqs=8)


class Running:
    """A server in a thread, with control over its engine's steps."""

    def __init__(self, llm: Any, **options: Any) -> None:
        sock = bind("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.llm = llm
        self.server = Server(llm, name="babbler", **options)
        self.service = self.server.service
        self._gate: threading.Semaphore | None = None
        self._execute, llm.engine.runner.execute = llm.engine.runner.execute, self._step
        self._failing: Exception | None = None
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self._thread.start()
        until(lambda: self.server.started)

    @property
    def engine(self) -> Any:
        return self.server.thread.engine

    def hold(self) -> None:
        """Blocks the engine's steps until `let` or `release`."""
        self._gate = threading.Semaphore(0)

    def let(self, steps: int = 1) -> None:
        assert self._gate is not None
        self._gate.release(steps)

    def release(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release(1000)

    def fail(self, error: Exception) -> None:
        """Makes the next step raise ``error``."""
        self._failing = error

    def idle(self) -> bool:
        return not self.engine.has_unfinished() and not self.service._jobs

    def stop(self) -> None:
        self.server.should_exit = True
        self.release()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not stop"

    def _step(self, plan: Any) -> Any:
        gate = self._gate
        if gate is not None:
            gate.acquire()
        error, self._failing = self._failing, None
        if error is not None:
            raise error
        return self._execute(plan)


@pytest.fixture(scope="session")
def start(llm) -> Iterator[Callable[..., Running]]:
    """``start(limits=…, keys=…, **engine settings)`` starts a server of the model with a new engine."""
    running: list[Running] = []

    def start(limits: Limits | None = None, keys: tuple[str, ...] = (), visualize: bool = False, **settings: Any):
        engine = llm.build_engine(replace(llm.engine.config, **settings))
        twin = copy(llm)
        twin.engine = engine
        running.append(Running(twin, limits=limits, keys=keys, visualize=visualize))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def shared(start) -> Running:
    """The server shared by tests that do not change its state."""
    return start()


@pytest.fixture
def server(shared) -> Iterator[Running]:
    """`shared`; checks after the test that it is idle and every block is free."""
    yield shared
    shared.release()
    until(shared.idle, "a request is left")
    shared.server.thread.call(shared.engine.check).result(PATIENCE)
    assert not shared.engine.block_tables()
