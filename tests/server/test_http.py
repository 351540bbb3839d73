"""The server with hostile or faulty clients, which send raw HTTP without a client library."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

import httpx2
import pytest

from minipaged import SamplingParams
from minipaged.core.plan import SampledToken
from minipaged.errors import InvalidConfig, PortInUse, RequestFailed
from minipaged.server.routes import EventStream
from minipaged.server.run import Server, bind
from minipaged.server.service import Limits
from tests.server.conftest import HTTP, PATIENCE, Running, in_thread, run_async, until

GOOD = {"model": "babbler", "prompt": "The quick", "max_tokens": 3}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
JSON = {"Content-Type": "application/json"}


def post(server: Running, body: Any = GOOD, path: str = "/v1/completions", **options: Any) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(server.url + path, content=content, **({"headers": JSON} | options))


def is_error(response: httpx2.Response, status: int) -> dict[str, Any]:
    """Checks that the response is an error in OpenAI's format, and returns it."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["message"]
    return response.json()["error"]


def connection(server: Running, body: dict[str, Any], read_buffer: int | None = None) -> socket.socket:
    """A connection with a request sent and no answer read."""
    sock = socket.socket()
    if read_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
    sock.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    sock.sendall(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def test_the_models_own_sampling_parameters_apply_where_a_request_gives_none(server, monkeypatch) -> None:
    greedy = post(server, GOOD | {"temperature": 0, "max_tokens": 8}).json()["choices"][0]["text"]
    monkeypatch.setattr(server.llm, "default_params", SamplingParams(temperature=100, top_k=1))
    assert post(server, GOOD | {"max_tokens": 8}).json()["choices"][0]["text"] == greedy
    assert post(server, GOOD | {"max_tokens": 8, "top_k": None}).json()["choices"][0]["text"] == greedy
    assert post(server, GOOD | {"max_tokens": 8, "top_k": 0, "seed": 1}).json()["choices"][0]["text"] != greedy


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"17", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000,
        b'{"model": "babbler", "prompt": "\\ud800"}', b'{"model": "babbler", "prompt": "x", "temperature": NaN}',
        b'{"model": "babbler", "prompt": "x", "temperature": 1e999}',
        b'{"model": "babbler", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_garbage(server, body: bytes, path: str) -> None:
    is_error(post(server, body, path), 400)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 7}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["x", 3]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"model": 7}, "model"),
        ({"model": None}, "model"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 9.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"n": 1.0}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"nothing": 1}}, "stream_options.nothing"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1": "much"}}, "logit_bias"),
        ({"seed": "lucky"}, "seed"),
        ({"suffix": "the end"}, "suffix"),
        ({"\ud800".encode("utf-8", "surrogatepass").decode("latin-1"): 1}, None),
    ],
)
def test_wrong_types_are_named(server, change: dict[str, Any], param: str | None) -> None:
    error = is_error(post(server, GOOD | change), 400)
    assert param is None or error["param"].startswith(param)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [""]}, {"prompt": ["x"] * 300},
        {"prompt": [10**9]}, {"prompt": [-1]}, {"max_tokens": -1}, {"n": 10**9}, {"best_of": 1, "n": 2},
        {"best_of": 2, "stream": True}, {"echo": True, "logprobs": 1, "stream": True}, {"logprobs": 21},
        {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}, {"stop": ["a", ""]}, {"min_tokens": 99}, {"top_k": -1},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_sense(server, change: dict[str, Any]) -> None:
    is_error(post(server, GOOD | change), 400)


def test_an_error_quotes_no_more_than_a_little(server) -> None:
    assert len(post(server, GOOD | {"model": "m" * 100_000}).text) < 2000
    assert len(post(server, GOOD | {"stop": [""] * 50_000}).text) < 2000


def test_a_body_can_be_too_large_with_its_length_said_or_not(start) -> None:
    server = start(limits=Limits(max_body=10_000))
    large = json.dumps(GOOD | {"prompt": "x" * 20_000}).encode()
    error = is_error(post(server, large), 413)
    assert error["code"] == "request_too_large" and "10000" in error["message"]

    def pieces():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    is_error(HTTP.post(f"{server.url}/v1/completions", content=pieces(), headers=JSON), 413)
    assert post(server).status_code == 200


def test_a_body_that_does_not_come(start) -> None:
    server = start(limits=Limits(body_timeout=0.1))
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        sock.settimeout(PATIENCE)
        assert b"408" in sock.recv(100)
    assert post(server).status_code == 200


def test_hanging_up_in_the_midst_of_a_body_is_no_error(start, caplog) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    gone = 'minipaged_requests_total{endpoint="completions",status="gone"} 1.0'
    until(lambda: gone in HTTP.get(f"{server.url}/metrics").text, "the request was not counted")
    assert not caplog.records, "a client's error should not be logged"


def test_paths_methods_and_content_types(server) -> None:
    is_error(HTTP.get(f"{server.url}/v1/nothing"), 404)
    is_error(HTTP.get(f"{server.url}/docs"), 404)
    is_error(HTTP.get(f"{server.url}/v1/completions"), 405)
    is_error(HTTP.get(f"{server.url}/v1/models/other"), 404)
    assert HTTP.get(f"{server.url}/health").json() == {"status": "ok"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        is_error(post(server, headers={"Content-Type": kind}), 415)
    assert post(server, headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_web_pages_get_nothing(server) -> None:
    """No CORS header allows a web page to read answers, and foreign host names are rejected (DNS rebinding)."""
    preflight = HTTP.options(f"{server.url}/v1/completions", headers={"Origin": "http://evil.example"})
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", ""):
        is_error(HTTP.get(f"{server.url}/v1/models", headers={"Host": host}), 403)
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1:1", "[::1]", f"[::1]:{server.port}"):
        assert HTTP.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200


def test_everything_but_health_needs_the_key(start) -> None:
    server = start(keys=("sesame",))
    assert HTTP.get(f"{server.url}/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing"):
        for given in ({}, {"Authorization": "sesame"}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer"}):
            assert is_error(HTTP.get(server.url + path, headers=given), 401)["code"] == "invalid_api_key"
    is_error(HTTP.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer sésame".encode()}), 401)
    assert HTTP.get(f"{server.url}/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200
    is_error(post(server, b"{", headers=JSON), 401)


def test_what_is_asked_stays_out_of_the_logs(server, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG, "minipaged")
    secret = "xyzzy plugh"
    post(server, GOOD | {"prompt": secret})
    post(server, GOOD | {"prompt": secret, "nonsense": secret})
    server.fail(RuntimeError("out of memory"))
    assert post(server, GOOD | {"prompt": secret}).status_code == 500
    out, errors = capfd.readouterr()
    assert "out of memory" in caplog.text
    assert secret not in caplog.text + out + errors


def test_a_request_from_which_nothing_can_be_drawn_fails_alone(server, monkeypatch) -> None:
    sample = server.engine.sampler

    def sampler(logits, plan):  # requests with the seed 13 fail at their third token
        error = RequestFailed("no token can be drawn")
        doomed = [request.params.seed == 13 and seq.num_output == 2 for request, seq in plan.samples]
        tokens = zip(sample(logits, plan), doomed, strict=True)
        return [SampledToken(-1, error=error) if fails else token for token, fails in tokens]

    good = GOOD | {"max_tokens": 40, "ignore_eos": True, "seed": 1}
    alone = post(server, good).json()["choices"]
    monkeypatch.setattr(server.engine, "sampler", sampler)
    server.hold()
    neighbour = in_thread(lambda: post(server, good))
    failed = in_thread(lambda: post(server, good | {"seed": 13}))
    streamed = in_thread(lambda: post(server, good | {"seed": 13, "stream": True}))
    until(lambda: len(server.service._jobs) == 3)
    server.release()
    assert neighbour.result(PATIENCE).json()["choices"] == alone
    error = is_error(failed.result(PATIENCE), 500)
    assert (error["message"], error["code"]) == ("no token can be drawn", "request_failed")
    events = [line for line in streamed.result(PATIENCE).text.splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: ")) == {"error": error} and "[DONE]" not in events[-1]


def test_parameters_that_forbid_every_token_are_refused(server) -> None:
    every = range(server.engine.vocab_size)
    ban = {"logit_bias": {str(token): -100 for token in every}}
    for change in ({"min_tokens": 1, "stop_token_ids": list(every)}, ban):
        assert "no token can be drawn" in is_error(post(server, GOOD | change), 400)["message"]


def test_a_stop_string_that_is_a_special_token_stops(server) -> None:
    """<|user|> is made likely: it is not in the text, and the text ends where it is generated."""
    tokenizer = server.llm.tokenizer
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    asked = GOOD | {"max_tokens": 30, "temperature": 0, "ignore_eos": True, "logit_bias": {str(user): 100}}
    (without,) = post(server, asked).json()["choices"]
    (choice,) = post(server, asked | {"stop": ["<|user|>"]}).json()["choices"]
    assert (without["text"], without["finish_reason"]) == ("", "length")
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_half_of_a_surrogate_pair_is_refused_wherever_it_is(server) -> None:
    for change in ({"prompt": "\ud800"}, {"prompt": ["fine", "\udfff"]}, {"stop": "\ud800"}, {"user": "\ud800"}):
        is_error(post(server, GOOD | change), 400)
    talk = {"model": "babbler", "messages": [{"role": "user", "content": "\ud83d"}]}
    is_error(post(server, talk, "/v1/chat/completions"), 400)


def test_hanging_up_in_the_midst_of_a_stream(server) -> None:
    sock = connection(server, GOOD | {"max_tokens": 1900, "stream": True, "ignore_eos": True})
    assert b"200 OK" in sock.recv(4096)
    until(server.engine.block_tables)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a TCP reset, not a normal close
    sock.close()
    until(server.idle, "its blocks are still held")


def test_who_does_not_read_holds_up_nobody_and_misses_nothing(server) -> None:
    asked = GOOD | {"max_tokens": 60, "stream": True, "ignore_eos": True, "logprobs": 20, "n": 4, "seed": 1}
    lazy = connection(server, asked, read_buffer=2048)
    until(lambda: server.service._jobs)
    assert post(server).status_code == 200, "other clients are served meanwhile"
    lazy.settimeout(PATIENCE)
    data = b""
    while b"[DONE]" not in data:
        data += lazy.recv(65536)
    lazy.close()
    texts = [""] * 4
    for line in data.decode().splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    whole = post(server, asked | {"stream": False}).json()
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_who_never_reads_is_given_up() -> None:
    closed, sent = [], []

    async def events():
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            closed.append(True)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()  # the socket's buffer stays full

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    run_async(EventStream(events(), patience=0.05)({"type": "http"}, receive, send))
    assert closed and len(sent) == 3, "the connection is closed without an end"


def test_two_requests_on_one_connection(server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(PATIENCE)
        data = json.dumps(GOOD).encode()
        for _ in range(2):
            sock.sendall(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(65536)
            assert b"200 OK" in answer


def test_a_port_in_use_is_told_before_a_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(PortInUse, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(PortInUse, match="nowhere.invalid"):
        bind("nowhere.invalid", 80)


def test_limits_and_the_page_are_checked(llm) -> None:
    for wrong in ({"max_body": 0}, {"timeout": -1.0}, {"max_queue": -1}):
        with pytest.raises(InvalidConfig):
            Limits(**wrong)
    for options in ({"host": "0.0.0.0"}, {"keys": ("k",)}):
        with pytest.raises(InvalidConfig, match="the page"):
            Server(llm, visualize=True, **options)


def test_many_clients_that_hang_up_at_random_leave_nothing_behind(server) -> None:
    asked = GOOD | {"max_tokens": 300, "stream": True, "ignore_eos": True}
    socks = [connection(server, asked) for _ in range(12)]
    for sock in socks[::2]:
        sock.close()
    answers = [in_thread(lambda: post(server)) for _ in range(4)]
    for sock in socks[1::2]:
        sock.recv(1000)
        sock.close()
    assert all(answer.result(PATIENCE).status_code == 200 for answer in answers)


def test_connections_that_say_nothing_are_limited(start) -> None:
    server = start(limits=Limits(max_concurrent=1))
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(server.service.limits.max_connections)]
    until(lambda: len(server.server.server_state.connections) == len(idle))
    assert HTTP.get(f"{server.url}/health").status_code == 503
    for sock in idle:
        sock.close()
    until(lambda: not server.server.server_state.connections)
    assert post(server).status_code == 200


def test_without_prometheus_client_metrics_say_what_to_install(start, monkeypatch) -> None:
    monkeypatch.setattr("minipaged.server.counters.prometheus", None)
    server = start()
    assert "pip install" in is_error(HTTP.get(f"{server.url}/metrics"), 501)["message"]
    assert post(server).status_code == 200
