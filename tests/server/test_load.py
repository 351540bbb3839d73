"""The load generator, with this server and with faulty ones."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from minipaged import cli
from minipaged.server.client import RequestFailed
from minipaged.server.load import WORDS, Goal, Sample, Target, first_model, percentile, prompt_of, run, summarize
from minipaged.workloads import TraceRequest
from tests.server.conftest import PATIENCE, Running, in_thread, run_async


def trace(count: int, gap: float = 0.0, **fields: int) -> list[TraceRequest]:
    return [TraceRequest(i * gap, 5, 4, stream=i, **fields) for i in range(count)]


def test_every_request_is_sent_and_measured(server: Running) -> None:
    target = Target(f"{server.url}/v1", run_async(first_model(f"{server.url}/v1", None)), ignore_eos=True)
    done: list[int] = []
    samples = run_async(run(target, trace(12, 0.01), done.append))
    assert done == list(range(1, 13))
    for i, sample in enumerate(samples):
        assert not sample.error and sample.due == pytest.approx(i * 0.01)
        assert sample.output_tokens == 4 and sample.prompt_tokens > 5
        assert 0 < sample.first_token <= sample.ended - sample.due
        assert 1 <= len(sample.chunks) <= 4 and sample.chunks == sorted(sample.chunks)


def test_latency_counts_from_when_a_request_was_due(server: Running) -> None:
    """A blocked server delays all requests, and each one's latency includes the delay."""
    server.hold()
    threading.Timer(0.3, server.release).start()
    samples = run_async(run(Target(f"{server.url}/v1", "babbler"), trace(5, 0.01)))
    assert all(sample.first_token > 0.2 for sample in samples if not sample.error)
    assert sum(not sample.error for sample in samples) >= 3


def test_numbers_are_what_they_are_called() -> None:
    samples = [
        Sample(0.0, [1.0, 1.5, 2.0], 2.0, 10, 3),
        Sample(1.0, [1.1, 1.2], 1.2, 20, 2),
        Sample(2.0, ended=2.5, error="429: too many"),
    ]
    result = summarize(samples, 4.0, Goal(first_token=0.5, token=0.2), Target("http://x", "m"))
    assert result.row("requests answered").ours == 2 and result.row("requests that failed").ours == 1
    assert result.row("offered").ours == pytest.approx(3 / 4)
    assert result.row("throughput").ours == pytest.approx(2 / 4)
    assert result.row("goodput (0.5 s, 0.2 s)").ours == pytest.approx(1 / 4)
    assert result.row("output").ours == pytest.approx(5 / 4)
    assert result.row("time to first token, mean").ours == pytest.approx((1.0 + 0.1) / 2)
    assert result.row("between tokens, p50").ours == pytest.approx(0.5)
    assert result.row("normalized latency, mean").ours == pytest.approx((2.0 / 3 + 0.2 / 2) / 2)
    assert result.assumed == ["429: too many: 1 requests"]
    assert [len(curve["x"]) for curve in result.figure["data"]] == [2, 3, 2]
    assert percentile([7.0], 99) == 7.0 and percentile([1.0, 2.0, 3.0], 50) == 2.0
    with pytest.raises(RequestFailed, match="none of 1"):
        summarize(samples[2:], 4.0, Goal(), Target("http://x", "m"))


def test_prompts_share_what_the_trace_says_they_share() -> None:
    first, second = (prompt_of(r).split() for r in trace(2, prefix=1, prefix_tokens=3))
    assert len(first) == 5 and set(first) <= set(WORDS)
    assert first[:3] == second[:3] and first != second


@pytest.fixture
def odd_server() -> Iterator[Callable[[bytes, int], str]]:
    """``odd_server(body, status)`` -> URL of a server that always answers this."""
    servers = []

    def start(body: bytes, status: int = 200) -> str:
        class Odd(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"error": {"message": "too many"}}', 429, "429: too many"),
        (b"<html>", 502, "502: <html>"),
        (b"data: {\n\n", 200, "not an event of OpenAI's"),
        (b'data: {"error": {"message": "it broke"}}\n\n', 200, "it broke"),
        (b"data: [DONE]\n\n", 200, "no usage"),
    ],
)
def test_what_fails_is_counted_with_the_reason(odd_server, body, status, words) -> None:
    (sample,) = run_async(run(Target(odd_server(body, status), "m"), trace(1)))
    assert words in sample.error


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_empty_answer_is_an_answer(odd_server, tokens) -> None:
    body = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": %d}}\n\n' % tokens
    (sample,) = run_async(run(Target(odd_server(body, 200), "m"), trace(1)))
    assert not sample.error and len(sample.chunks) == 1 and 0 < sample.normalized < float("inf")


def test_the_command_prints_and_writes_a_report(server: Running, tmp_path, monkeypatch, capsys) -> None:
    url, out = f"{server.url}/v1", tmp_path / "report"
    command = f"bench serve --url {url} --rate 40 --cv 1.5 --duration 0.3 --max-output 3 --max-prompt 6 --out {out}"
    monkeypatch.setattr(sys, "argv", ["minipaged", *command.split()])
    with pytest.raises(SystemExit) as leaving:
        in_thread(cli.main).result(PATIENCE)  # it runs its own event loop
    printed = capsys.readouterr().out
    assert leaving.value.code == 0 and "goodput" in printed and "babbler" in printed
    written = json.loads((out / "serve.json").read_text())
    assert written["data"]["target"] == {"url": url, "model": "babbler"}
    assert len(written["data"]["samples"]) == written["rows"][0]["ours"] + written["rows"][1]["ours"]


def test_a_server_that_is_not_there_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["minipaged", "bench", "serve", "--url", "http://127.0.0.1:9/v1"])
    with pytest.raises(SystemExit) as leaving:
        in_thread(cli.main).result(PATIENCE)  # it runs its own event loop
    assert leaving.value.code == 1 and "names no model" in capsys.readouterr().err
