"""The request schemas of OpenAI's API, and their conversion to `SamplingParams`.

The server ignores only fields that OpenAI itself calls bookkeeping (``user``, ``metadata``) and fields whose value asks
for the default (``"response_format": {"type": "text"}``). It rejects every other unknown field by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import from_json

from minipaged.config import SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.text.parts import text_of

MAX_PROMPTS = 256  # in one completions request
MAX_MESSAGE = 600  # characters of an error message, which may quote the request


class ApiError(Exception):
    """An error response in OpenAI's format: ``{"error": {message, type, param, code}}``."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        message = str(self)
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + " …"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


Body = TypeVar("Body", "ChatRequest", "CompletionRequest", "ChatRequest | CompletionRequest")


class _Strict(BaseModel):
    """Base of all schemas: no conversion of strings to numbers, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Strict):
    type: Literal["text"]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(text_of)]  # OpenAI's text parts, joined

    def plain(self) -> dict[str, str]:
        """The message as chat templates expect it. "developer" is OpenAI's newer word for "system"."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class _Request(_Strict):
    """Fields that completions and chat completions share. `SamplingParams` checks their limits.

    Sampling parameters that a request leaves out are the model's own (`LLM.default_params`), not the values here.
    """

    model: str
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    stop: str | list[str] = []
    seed: int | None = None  # repeats with the same requests on the same machine; in another batch up to rounding
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Extensions of OpenAI's API, with vLLM's names.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    # OpenAI's bookkeeping, which is ignored.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, defaults: SamplingParams, **own: Any) -> SamplingParams:
        """``defaults``, updated with the fields that the request gives, and with ``own``. Raises `InvalidRequest`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options has no effect without stream=true")
        same = (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed",
        )  # fmt: skip
        given: dict[str, Any] = {name: getattr(self, name) for name in same if name in self.model_fields_set}
        given |= {"n": self.n, "logit_bias": _biases(self.logit_bias)}
        return replace(defaults, **(given | own))


class ChatRequest(_Request):
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    # Extensions of OpenAI's API, with vLLM's names.
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def template(self) -> dict[str, Any]:
        """The keywords of `text.render_chat`. Raises `InvalidRequest`."""
        if self.add_generation_prompt is self.continue_final_message:  # None: not given
            raise InvalidRequest("either add_generation_prompt or continue_final_message must be true, and not both")
        return {
            "continue_final_message": self.continue_final_message,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Fields that the request leaves out are taken from ``defaults``. Raises `InvalidRequest`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs has no effect without logprobs=true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens are the same thing; give one of them")
        return self._params(
            defaults,
            max_tokens=limits.pop() if limits else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Fields that the request leaves out are taken from ``defaults``. Raises `InvalidRequest`."""
        if self.stream and self.echo and self.logprobs is not None:
            raise InvalidRequest("the prompt's logprobs cannot be streamed; leave out stream, echo or logprobs")
        if self.max_tokens == 0 and (self.stream or not self.echo):
            raise InvalidRequest("max_tokens may be 0 only with echo and without stream")
        more: dict[str, Any] = {"logprobs": self.logprobs}
        if self.best_of is not None:
            if self.stream:
                raise InvalidRequest("best_of picks the best samples at the end; leave out stream or best_of")
            if self.best_of < self.n:
                raise InvalidRequest(f"best_of ({self.best_of}) is below n ({self.n})")
            more |= {"n": self.best_of, "logprobs": self.logprobs or 0}
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = self.logprobs
        # The prompt's log-probabilities come with the first token, so max_tokens=0 still generates one.
        return self._params(defaults, max_tokens=self.max_tokens or 1, **more)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many. Raises `InvalidRequest` for none, or for more than `MAX_PROMPTS`."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
            raise InvalidRequest(f"prompt must hold between 1 and {MAX_PROMPTS} prompts, not {len(prompt)}")
        many: list[Any] = [prompt] if isinstance(prompt[0], int) else list(prompt)
        return many


def parse(kind: type[Body], body: bytes | dict[str, Any]) -> Body:
    """Parses a request from JSON or a decoded dict; a null field counts as not given. Raises `ApiError` 400."""
    if isinstance(body, bytes):
        try:
            body = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body: {why_no_json(error)}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(_given(body))
    except ValidationError as invalid:
        raise _bad_field(invalid) from None


def why_no_json(error: ValueError) -> str:
    """What is wrong with bytes that pydantic's parser refused."""
    if "hex escape" in str(error):  # JSON can escape half of a surrogate pair, but it is no character
        return f"a text in it has half of a surrogate pair, which is no character ({error})"
    return f"this is not valid JSON: {error}"


def _given(value: Any) -> Any:
    """Removes null fields: clients send whole messages back, with null for fields that a message does not have."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _bad_field(invalid: ValidationError) -> ApiError:
    error = invalid.errors(include_url=False, include_input=False)[0]
    # Without pydantic's names of a union's members.
    named = (part for part in error["loc"] if isinstance(part, int) or part.isidentifier())
    path = [part for part in named if part not in ("str", "int")]
    param = ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        name = ".".join(map(str, error["loc"]))
        return ApiError(400, f"there is no parameter {name!r} here, or it is not supported", param=name,
                        code="unknown_parameter")  # fmt: skip
    if error["type"] == "missing":
        return ApiError(400, f"{param!r} is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param!r}: {error['msg'].removeprefix('Value error, ')}", param=param, code="invalid_value")


def _biases(logit_bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in logit_bias.items()}
    except ValueError:
        raise InvalidRequest("the keys of logit_bias must be token ids") from None
