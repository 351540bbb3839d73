"""Converts the engine's outputs to the JSON of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipaged.config import SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.outputs import CompletionOutput, Delta, RequestOutput, differences
from minipaged.server.protocol import ApiError, ChatRequest, CompletionRequest
from minipaged.text.chat import render_chat
from minipaged.text.spelling import Reader, Spelled, spelling_of
from minipaged.text.stream import context_of, decode

Prepared = tuple["Answer", list[list[int]], SamplingParams]
LOWEST = -9999.0  # OpenAI's log-probability of an impossible token; JSON has no infinity


def prepare(llm: Any, model: str, request: ChatRequest | CompletionRequest) -> Prepared:
    """Validates a request. Returns its `Answer`, the prompts' token ids, and the sampling parameters.

    Raises `InvalidRequest`, and `ApiError` 404 if the request names another model than ``model``.
    """
    if request.model != model:
        raise no_model(request.model, model)
    params = request.params(llm.default_params)
    if isinstance(request, ChatRequest):
        messages = [message.plain() for message in request.messages]
        prompts = [render_chat(llm.tokenizer, messages, **request.template())]
        return ChatAnswer(llm.tokenizer, model, request, prompts), prompts, params
    given = request.prompts()
    if "" in given:
        raise InvalidRequest("the prompt is empty; give at least one character")
    prompts = [llm.encode(one) if isinstance(one, str) else one for one in given]
    return TextAnswer(llm.tokenizer, model, request, prompts), prompts, params


def model_name(model: str) -> str:
    """The model's name in the API: a hub id unchanged, or the last part of a path."""
    return Path(model).resolve().name.removesuffix(".gguf") if Path(model).exists() else model


def no_model(name: str, model: str) -> ApiError:
    message = f"there is no model {name[:200]!r} here; use {model!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def refusal(error: InvalidRequest) -> ApiError:
    """Converts an `InvalidRequest` to an `ApiError` 400 with OpenAI's error code."""
    too_long = "needs room for one more" in str(error)
    return ApiError(400, str(error), code="context_length_exceeded" if too_long else None)


class Answer:
    """Builds the response to one HTTP request from its outputs, whole or streamed in chunks.

    ``prompts`` are the token ids of its prompts. Choice ``p * n + i`` is the i-th continuation of prompt p.
    """

    object = ""
    chunk_object = ""
    prefix = ""

    def __init__(self, tokenizer: Any, model: str, request: Any, prompts: list[list[int]]) -> None:
        self._tokenizer, self._request, self._prompts = tokenizer, request, prompts
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._seen: list[dict[int, CompletionOutput]] = [{} for _ in prompts]
        self._spelling = spelling_of(tokenizer)
        self._readers: dict[tuple[int, int], Reader] = {}  # of each continuation, by prompt and number
        self.sampled = 0  # tokens of all continuations, including those that best_of discards
        self.cached = 0  # tokens of the prompts whose KV came from the prefix cache

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with `last_chunk`."""
        return self._request.include_usage

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response without streaming; ``outputs`` are finished, one for each prompt."""
        choices = []
        for prompt, output in enumerate(outputs):
            self.count(output)
            for rank, out in enumerate(self._best(output.outputs)):
                choices.append({"index": prompt * self._request.n + rank, "finish_reason": out.finish_reason}
                               | self._choice(prompt, output, out))  # fmt: skip
        return {**self._head, "object": self.object, "choices": choices, "usage": self._usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks sent before the first token."""
        return iter(())

    def chunks(self, prompt: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Chunks with the new tokens in a prompt's output."""
        for delta in differences(output, self._seen[prompt]):
            if delta.text or delta.finish_reason or delta.logprobs:
                yield self._chunk([self._piece(prompt, delta)])

    def last_chunk(self) -> dict[str, Any]:
        """A chunk that holds only the usage."""
        return self._chunk([]) | {"usage": self._usage()}

    def count(self, output: RequestOutput) -> None:
        """Counts the tokens of a finished output."""
        if getattr(self._request, "max_tokens", None) != 0:
            self.sampled += sum(len(out.token_ids) for out in output.outputs)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self._prompts))
        counts = {"prompt_tokens": prompt, "completion_tokens": self.sampled, "total_tokens": prompt + self.sampled}
        return counts | {"prompt_tokens_details": {"cached_tokens": self.cached}}

    def _best(self, outputs: list[CompletionOutput]) -> list[CompletionOutput]:
        """The ``n`` continuations with the highest log-probability per token, if ``best_of`` is above ``n``."""
        if len(outputs) <= self._request.n:
            return outputs
        ranked = sorted(outputs, key=lambda out: -(out.cumulative_logprob or 0.0) / max(1, len(out.token_ids)))
        return ranked[: self._request.n]

    def _choice(self, prompt: int, output: RequestOutput, out: CompletionOutput) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, prompt: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _reader(self, prompt: int, index: int, offset: int = 0) -> Reader:
        """What reads the tokens of a continuation, which come in parts if they are streamed."""
        if (prompt, index) not in self._readers:
            first = self._tokenizer is None or not context_of(self._tokenizer, self._prompts[prompt])
            self._readers[prompt, index] = Reader(self._spelling, offset, first)
        return self._readers[prompt, index]


class ChatAnswer(Answer):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"
    _request: ChatRequest

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(self._request.n):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, prompt: int, output: RequestOutput, out: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": out.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(prompt, out.index, out.token_ids, out.logprobs)}

    def _piece(self, prompt: int, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        logprobs = self._logprobs(prompt, delta.index, delta.token_ids, delta.logprobs)
        return {"index": delta.index, "delta": content, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _logprobs(
        self, prompt: int, index: int, tokens: list[int], logprobs: list[dict[int, float]] | None
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        number = self._request.top_logprobs or 0
        content = []
        for (token, _, first), likely in zip(self._reader(prompt, index).read(tokens), logprobs, strict=True):
            top = [self._entry(*pair, first) for pair in _likeliest(likely, number)]
            content.append(self._entry(token, likely[token], first) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float, first: bool) -> dict[str, Any]:
        """The ``bytes`` of all entries add up to the text; those of a special token are none."""
        spelled = list(self._spelling.bytes_of(token, first))
        return {"token": self._spelling.name(token, first), "logprob": max(logprob, LOWEST), "bytes": spelled}


class TextAnswer(Answer):
    object = chunk_object = "text_completion"
    prefix = "cmpl"
    _request: CompletionRequest

    def __init__(self, tokenizer: Any, model: str, request: CompletionRequest, prompts: list[list[int]]) -> None:
        super().__init__(tokenizer, model, request, prompts)
        given = request.prompts()
        self._texts = [self._as_text(one) for one in given] if request.echo else [""] * len(given)

    def opening(self) -> Iterator[dict[str, Any]]:
        """The prompts, if ``echo`` is set."""
        for prompt, text in enumerate(self._texts if self._request.echo else ()):
            for index in range(self._request.n):
                yield self._chunk([self._text(prompt, index, text, None, None)])

    def _choice(self, prompt: int, output: RequestOutput, out: CompletionOutput) -> dict[str, Any]:
        echo = self._texts[prompt]
        empty = self._request.max_tokens == 0
        text = echo if empty else echo + out.text
        if self._request.logprobs is None:
            return {"text": text, "logprobs": None}
        spelled = [] if empty else self._reader(prompt, out.index, len(echo)).read(out.token_ids)
        logprobs: list[Any] = [] if empty else list(out.logprobs or ())
        if output.prompt_logprobs is not None:
            before = Reader(self._spelling, first=True).read(output.prompt_token_ids)
            # The given text may be shorter than its tokens' text: some tokenizers normalize it.
            spelled = [token._replace(offset=min(token.offset, len(echo))) for token in before] + spelled
            logprobs = output.prompt_logprobs + logprobs
        choice: dict[str, Any] = {"text": text, "logprobs": self._logprobs(spelled, logprobs)}
        return choice | {"finish_reason": "length"} if empty else choice

    def _piece(self, prompt: int, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if delta.logprobs is not None:
            logprobs = self._logprobs(self._reader(prompt, delta.index).read(delta.token_ids), delta.logprobs)
        return self._text(prompt, delta.index, delta.text, logprobs, delta.finish_reason)

    def _text(
        self, prompt: int, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        number = prompt * self._request.n + index
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[Spelled], logprobs: list[Any]) -> dict[str, Any]:
        """Log-probabilities in OpenAI's format; null for a prompt's first token."""
        number = self._request.logprobs or 0
        both = list(zip(tokens, logprobs, strict=True))
        return {
            "tokens": [self._spelling.name(token.token_id, token.first) for token in tokens],
            "token_logprobs": [max(likely[token.token_id], LOWEST) if likely else None for token, likely in both],
            "top_logprobs": [self._top(likely, number, token.first) if likely else None for token, likely in both],
            "text_offset": [token.offset for token in tokens],
        }

    def _as_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            return "".join(map(self._spelling.name, prompt))
        return decode(self._tokenizer, prompt)

    def _top(self, likely: dict[int, float], number: int, first: bool) -> dict[str, float]:
        """By name; of tokens with the same name, the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in _likeliest(likely, number):
            top.setdefault(self._spelling.name(token, first), max(logprob, LOWEST))
        return top


def _likeliest(logprobs: dict[int, float], number: int) -> list[tuple[int, float]]:
    """The ``number`` likeliest tokens. ``logprobs`` holds the sampled token, too, which may be less likely."""
    return sorted(logprobs.items(), key=lambda pair: -pair[1])[:number]
