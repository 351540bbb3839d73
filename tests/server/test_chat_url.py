"""``minipaged chat --url``: the same conversation, answered by a server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minipaged import SamplingParams, cli
from minipaged.cli.screen import shown
from tests.server.conftest import Running


@pytest.fixture
def say(server: Running, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """``say(*lines, args=(), url=…)`` -> exit code, stdout, stderr."""

    def say(*lines: str, args: tuple[str, ...] = (), url: str = f"{server.url}/v1") -> tuple[int, str, str]:
        todo = iter(lines)

        def type_one(prompt: str) -> str:
            try:
                return next(todo)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", type_one)
        monkeypatch.setattr(sys, "argv", ["minipaged", "chat", "--url", url, *args])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        return leaving.value.code, *capsys.readouterr()

    return say


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def test_a_server_says_what_the_engine_here_says(say, llm) -> None:
    code, out, err = say("Hello", "And then?", args=("--temperature", "0", "--max-tokens", "6", "--system", "S"))
    messages = [{"role": "system", "content": "S"}]
    for text in ("Hello", "And then?"):
        messages.append({"role": "user", "content": text})
        answer = llm.chat(messages, greedy(6)).outputs[0].text
        assert shown(answer) + "\n" in out
        messages.append({"role": "assistant", "content": answer})
    assert (code, err) == (0, "")


def test_errors_are_one_line_and_the_chat_goes_on(say, server) -> None:
    code, out, err = say("x " * 3000, "Hello", args=("--max-tokens", "3"))
    assert code == 0 and err.count("\n") == 1 and "needs room for one more" in err
    server.fail(RuntimeError("out of memory"))
    code, _, err = say("Hello", "Hello", args=("--max-tokens", "3"))
    assert code == 0 and err.count("\n") == 1 and "a step of the engine failed" in err
    code, _, err = say("Hello", url="http://127.0.0.1:9/v1", args=("--model", "babbler"))
    assert code == 0 and err.count("\n") == 1 and "http://127.0.0.1:9/v1" in err
    code, _, err = say("Hello", url="http://127.0.0.1:9/v1")
    assert code == 1 and err.count("\n") == 1 and "give --model" in err
    code, _, err = say("Hello", url="localhost:8000/v1")
    assert code == 2 and err.count("\n") == 1 and "is not a URL such as" in err
    code, _, err = say("Hello", args=("--model", "gpt-9"))
    assert code == 0 and "404: there is no model 'gpt-9' here; use 'babbler'" in err


def test_the_server_is_asked_for_its_model_and_the_commands_work(say, llm, server, tmp_path) -> None:
    messages: list[dict[str, str]] = [{"role": "user", "content": "Hello"}]
    args = ("--temperature", "0", "--max-tokens", "4")
    lines = ("Hello", "/more", f"/save {tmp_path / 'talk'}", "/retry", "/undo", "/no-think", "Hello", "Hello")
    _, out, err = say(*lines, args=args)
    assert out.startswith(f"babbler on {server.url}/v1; sampling: temperature 0 — as given; else its own")
    messages.append({"role": "assistant", "content": llm.chat(messages, greedy(4)).outputs[0].text.rstrip("\ufffd")})
    rest = llm.chat(messages, greedy(4), continue_final_message=True).outputs[0].text
    messages[1]["content"] += rest
    assert json.loads((tmp_path / "talk").read_text())["messages"] == messages
    assert err.count("\n") == 1 and "does not read 'enable_thinking'" in err
    assert out.rstrip("> \n").endswith("[cut: max_tokens is 4; /more goes on]"), "the next message is answered"


MODELS = {"data": [{"id": "odd", "max_model_len": "lots"}]}
STRANGE = [
    [{"choices": [{"delta": {"content": "half \ud83d"}}], "usage": {"prompt_tokens": "many"}}],
    [{"choices": [{"delta": {"content": 5}, "finish_reason": "stop"}], "usage": {"prompt_tokens_details": None}}],
    [{"choices": ["none"]}],
    [{"choices": [{"delta": "none"}], "usage": "none"}],
]


class _Strange(BaseHTTPRequestHandler):
    """Answers with events that OpenAI's API does not have, one list of `STRANGE` for each message."""

    def do_GET(self) -> None:
        self._send("application/json", json.dumps(MODELS))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        events = STRANGE[(len(self.server.bodies) - 1) % len(STRANGE)]  # type: ignore[attr-defined]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self._send("text/event-stream", text + "data: [DONE]\n\n")

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


def test_a_server_of_another_kind_never_ends_the_chat(say) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Strange) as strange:
        strange.bodies = []  # type: ignore[attr-defined]
        threading.Thread(target=strange.serve_forever, daemon=True).start()
        code, out, err = say("one", "two", "three", "four", "five", url=f"http://127.0.0.1:{strange.server_port}/v1")
        strange.shutdown()
    assert code == 0 and out.startswith("odd on") and "half \ufffd" in out
    assert err.count("\n") == 2 and err.count("sent an event of another form") == 2
    assert len(strange.bodies) == 5  # type: ignore[attr-defined]


def test_a_full_context_drops_the_oldest_turns(say, llm) -> None:
    lines = [f"{number}" + " word" * 300 for number in range(5)]  # about 500 tokens each, of 2,048
    _, out, err = say(*lines, args=("--temperature", "0", "--max-tokens", "4"))
    assert err == "" and "the model no longer sees 1 turn: “0 word" in out
