"""``minipaged chat --url``: the same conversation, answered by a server."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from minipaged import SamplingParams, cli
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
        monkeypatch.setattr(sys, "argv", ["minipaged", "chat", "--url", url, "--model", "babbler", *args])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        return leaving.value.code, *capsys.readouterr()

    return say


def test_a_server_says_what_the_engine_here_says(say, llm) -> None:
    code, out, err = say("Hello", "And then?", args=("--temperature", "0", "--max-tokens", "6", "--system", "S"))
    messages = [{"role": "system", "content": "S"}]
    for text in ("Hello", "And then?"):
        messages.append({"role": "user", "content": text})
        answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6)).outputs[0].text
        assert answer + "\n" in out
        messages.append({"role": "assistant", "content": answer})
    assert (code, err) == (0, "")


def test_errors_are_one_line_and_the_chat_goes_on(say, server) -> None:
    code, out, err = say("x " * 3000, "Hello", args=("--max-tokens", "3"))
    assert code == 0 and err.count("\n") == 1 and "needs room for one more" in err
    server.fail(RuntimeError("out of memory"))
    code, _, err = say("Hello", "Hello", args=("--max-tokens", "3"))
    assert code == 0 and err.count("\n") == 1 and "a step of the engine failed" in err
    code, _, err = say("Hello", url="http://127.0.0.1:9/v1")
    assert code == 0 and err.count("\n") == 1 and "http://127.0.0.1:9/v1" in err
