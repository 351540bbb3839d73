"""Who answers in ``minipaged chat``: the model in this process, or one on an OpenAI-compatible server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from minipaged.cli.options import own_sampling
from minipaged.errors import InvalidRequest, MinipagedError
from minipaged.events import Admitted, Event
from minipaged.models.sampling_defaults import CHAT_TEMPERATURE, FIELDS
from minipaged.server.client import TOO_LONG, RequestFailed, check, events

if TYPE_CHECKING:
    from minipaged.config import SamplingParams
    from minipaged.llm import LLM

Messages = list[dict[str, str]]


class ServerError(MinipagedError, RuntimeError):
    """The server could not be reached or answered with an error."""


class ContextFull(InvalidRequest):
    """The conversation leaves no room for an answer."""


@dataclass
class Question:
    """What an answer is wanted to: the messages, and how to answer.

    ``continues``: the last message is the beginning of the answer. ``sampling``: what the user has set, by the names of
    `SamplingParams`. ``template``: variables of the chat template. ``can_shrink``: the sender can leave out old turns.
    """

    messages: Messages
    continues: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    can_shrink: bool = False

    def answered(self, text: str) -> Messages:
        """The messages with the answer."""
        begun = self.messages[-1]["content"] if self.continues else ""
        before = self.messages[:-1] if self.continues else self.messages
        return [*before, {"role": "assistant", "content": begun + text}]


@dataclass
class Usage:
    """Numbers of tokens. ``cached``: those of the prompt whose KV came from the prefix cache; ``None``: unknown."""

    prompt: int | None = None
    cached: int | None = None
    output: int = 0


def whole_text(text: Any) -> str:
    """A text from a server, in which halves of surrogate pairs, which cannot be sent again, are replaced."""
    if not isinstance(text, str):
        return ""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count_or_none(number: Any) -> int | None:
    """A server's number of tokens; ``None`` if it is not one."""
    return number if type(number) is int and number >= 0 else None


class Answerer(Protocol):
    """``context``: the most tokens that a conversation can have; ``usage``: of the newest answer."""

    context: int | None
    usage: Usage
    stops_at_once: bool  # an exception may interrupt it anywhere

    def describe(self, sampling: dict[str, Any]) -> str:
        """One line: what is sampled with."""

    def check(self, template: dict[str, Any]) -> None:
        """Raises `InvalidRequest` if the model cannot chat, or its template does not read one of these variables."""

    def answer(self, question: Question) -> Iterator[tuple[str, str | None]]:
        """Yields pieces of the answer, each with the finish reason or ``None``.

        Raises `ContextFull` before the first piece, `InvalidRequest`, `ServerError`.
        """


class LocalModel:
    """Answers with an `LLM` in this process."""

    stops_at_once = False

    def __init__(self, llm: LLM) -> None:
        engine = llm.engine
        self.context: int | None = min(engine.max_model_len, engine.num_blocks * engine.memory.block_size)
        self.usage = Usage()
        self._llm = llm
        self._newest: tuple[Messages, list[int]] = [], []  # the conversation with its newest answer, and its tokens
        engine.events.subscribe(self._saw)

    def describe(self, sampling: dict[str, Any]) -> str:
        return own_sampling(self._llm, sampling, temperature=CHAT_TEMPERATURE)[1]

    def check(self, template: dict[str, Any]) -> None:
        self._llm.render_chat([{"role": "user", "content": "Hi"}], chat_template_kwargs=template)

    def answer(self, question: Question) -> Iterator[tuple[str, str | None]]:
        sampling = {"max_tokens": None} | question.sampling
        params, _ = own_sampling(self._llm, sampling, temperature=CHAT_TEMPERATURE)
        tokens, text = self._prompt(question), ""
        if question.can_shrink and self.context and len(tokens) + self._room(params) > self.context:
            raise ContextFull(f"{len(tokens):,} of {self.context:,} tokens leave too little room for an answer")
        self.usage = Usage(len(tokens))
        deltas: Any = self._llm.stream(list(tokens), params)
        try:
            for delta in deltas:
                self.usage.output += len(delta.token_ids)
                tokens += delta.token_ids
                text += delta.text
                yield delta.text, delta.finish_reason
        finally:
            deltas.close()  # ends the request
            self._newest = question.answered(text), tokens

    def _prompt(self, question: Question) -> list[int]:
        messages, tokens = self._newest
        if question.continues and question.messages == messages:
            return list(tokens)  # the same tokens, not the text tokenized again: as if the answer had never stopped
        return self._llm.render_chat(
            question.messages, continue_final_message=question.continues, chat_template_kwargs=question.template
        )

    def _room(self, params: SamplingParams) -> int:
        """Tokens to leave for the answer: a quarter of the context, unless it can only be shorter."""
        quarter = (self.context or 0) // 4
        return min(quarter, params.max_tokens or quarter)

    def _saw(self, event: Event) -> None:
        if isinstance(event, Admitted) and self.usage.cached is None:  # after a preemption it is admitted again
            self.usage.cached = event.num_cached


class RemoteModel:
    """Answers with a model on an OpenAI-compatible server. Without ``model`` the server is asked which it has."""

    stops_at_once = True

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        import httpx2

        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx2.Timeout(600, connect=10)
        self._url = url
        with self._errors():
            self._client = httpx2.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout)
        self.usage = Usage()
        self.model, self.context = self._find(model)

    def describe(self, sampling: dict[str, Any]) -> str:
        given = ", ".join(f"{name} {sampling[name]:g}" for name in FIELDS if name in sampling)
        return f"{self.model} on {self._url}; sampling: " + (f"{given} — as given; else " if given else "") + "its own"

    def check(self, template: dict[str, Any]) -> None:
        """The server checks at the first message."""

    def answer(self, question: Question) -> Iterator[tuple[str, str | None]]:
        body: dict[str, Any] = {"model": self.model, "messages": question.messages, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | question.sampling
        if question.template:
            body["chat_template_kwargs"] = question.template
        if question.continues:  # vLLM wants both
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        self.usage = Usage()
        with self._errors(), self._client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
            for event in events(response, response.iter_lines()):
                try:
                    pieces = [(whole_text((one.get("delta") or {}).get("content")), one.get("finish_reason"))
                              for one in event.get("choices") or ()]  # fmt: skip
                    usage = event.get("usage") or {}
                    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                except (AttributeError, TypeError):
                    raise ServerError(f"{self._url} sent an event of another form: {str(event)[:200]}") from None
                for text, reason in pieces:
                    self.usage.output += bool(text)  # servers usually send one chunk per token
                    yield text, reason
                if usage:
                    output = count_or_none(usage.get("completion_tokens")) or self.usage.output
                    self.usage = Usage(count_or_none(usage.get("prompt_tokens")), count_or_none(cached), output)

    def _find(self, model: str | None) -> tuple[str, int | None]:
        """The model's name and the most tokens of a conversation, if the server says so (vLLM's `max_model_len`)."""
        try:
            with self._errors():
                response = self._client.get("models")
                check(response)
            listed = {str(one["id"]): count_or_none(one.get("max_model_len")) for one in response.json()["data"]}
        except InvalidRequest:
            raise
        except (ServerError, ValueError, TypeError, KeyError, AttributeError) as error:
            if model is None:
                raise ServerError(f"{self._url} does not say which models it has ({error}); give --model") from None
            listed = {}
        if model is None and not listed:
            raise ServerError(f"{self._url} has no model")
        name = model or next(iter(listed))
        return name, listed.get(name) or None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the server's errors into `ServerError`, and that of a prompt which is too long into `ContextFull`."""
        import httpx2

        try:
            yield
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise InvalidRequest(f"{self._url} is not a URL such as http://127.0.0.1:8000/v1: {error}") from None
        except (httpx2.HTTPError, RequestFailed) as error:
            reason = f"{self._url}: {str(error) or type(error).__name__}"
            if getattr(error, "code", None) == TOO_LONG or re.search("context (length|size)", str(error), re.I):
                raise ContextFull(reason) from None
            raise ServerError(reason) from None
