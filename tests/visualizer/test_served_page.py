"""The page of a serving engine: it shows clients' requests, and viewers' commands affect the clients."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from minipaged import LLM
from tests.server.conftest import HTTP, PATIENCE, Running, in_thread, until


@pytest.fixture
def served(llm: LLM) -> Iterator[Running]:
    served = Running(llm, visualize=True)
    yield served
    served.stop()


def ask(served: Running, **options: object) -> httpx2.Response:
    body = {"model": "babbler", "prompt": "Once upon a time", "max_tokens": 6} | options
    return HTTP.post(f"{served.url}/v1/completions", json=body)


def test_the_page_shows_the_engine_that_serves(served: Running) -> None:
    usage = ask(served, n=2).json()["usage"]
    log = served.server._page.log
    until(lambda: log.state.finished, "the page saw nothing")
    tokens = sum(len(seq.tokens) for seq in log.state.seqs.values())
    assert len(log.state.seqs) == 2
    assert tokens == usage["completion_tokens"] + 2 * usage["prompt_tokens"]
    html = HTTP.get(f"{served.url}/visualizer/").text
    assert "minipaged" in html and "gradio" in html


def test_who_aborts_or_starts_over_on_the_page_ends_requests_with_an_error(served: Running) -> None:
    thread = served.server.thread
    thread.pause().result(PATIENCE)
    waiting = in_thread(lambda: ask(served))
    until(lambda: served.engine.has_unfinished())
    thread.abort(next(iter(served.service._jobs))).result(PATIENCE)
    aborted = waiting.result(PATIENCE)
    assert aborted.status_code == 500 and "aborted" in aborted.json()["error"]["message"]
    lost = in_thread(lambda: ask(served))
    until(lambda: served.engine.has_unfinished())
    thread.reset().result(PATIENCE)
    assert "started over" in lost.result(PATIENCE).json()["error"]["message"]
    assert ask(served).status_code == 200
