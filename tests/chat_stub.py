"""A stand-in for the model of ``minipaged chat``; ``python -m tests.chat_stub`` talks with it in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from minipaged.cli.chat_models import ContextFull, Question, Usage
from minipaged.cli.chat_session import Chat
from minipaged.cli.keyboard import messages
from minipaged.errors import InvalidRequest

CONTEXT = 40  # words of a conversation


class Echo:
    """Repeats the user's message. A message that it knows, or a word count, makes it answer otherwise.

    Its tokens are words; an answer is cut after ``max_tokens`` of them.
    """

    context: int | None = None
    stops_at_once = False

    def __init__(self) -> None:
        self.usage = Usage()
        self.asked: list[Question] = []

    def describe(self, sampling: dict[str, Any]) -> str:
        return f"sampling: {sampling}"

    def check(self, template: dict[str, Any]) -> None:
        if "enable_thinking" in template and self.context:
            raise InvalidRequest("it cannot think")

    def answer(self, question: Question) -> Iterator[tuple[str, str | None]]:
        self.asked.append(question)
        prompt = sum(len(message["content"].split()) for message in question.messages)
        if self.context and prompt >= self.context:
            raise ContextFull("too long")
        self.usage = Usage(prompt, cached=prompt // 2)
        user = ["nothing", *(m["content"] for m in question.messages if m["role"] == "user")][-1]
        words, begun = self._words(user), question.messages[-1]["content"] if question.continues else ""
        limit, room = question.sampling.get("max_tokens", 10**9), (self.context or 10**9) - prompt
        for number, word in enumerate(words):
            if begun.startswith(word):
                begun = begun.removeprefix(word)
                continue
            self.usage.output += 1
            cut = self.usage.output >= min(limit, room) and number + 1 < len(words)
            yield word, "length" if cut else None
            if cut:
                return
        yield "", "stop"

    def _words(self, message: str) -> Any:
        if message == "forever":
            return _Forever()
        if message.startswith("/"):
            return [f"a path: {message}"]
        return [f"You said {message[:0]}", *(f"{word} " for word in repr(message).split(" "))]


class _Forever:
    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[str]:
        while True:
            time.sleep(0.01)
            yield "on and "


class Hostile(Echo):
    """Answers with a sequence that would change the window's title, split over pieces, and others."""

    def answer(self, question: Question) -> Iterator[tuple[str, str | None]]:
        for piece in ("red \x1b", "[31m", " title \x1b]0;own", "ed\x07 \x9b2J", " over\rwritten", "\x08 end"):
            yield piece, None
        yield "", "stop"


if __name__ == "__main__":
    Chat(Echo(), None, {}, {}).run(messages())
