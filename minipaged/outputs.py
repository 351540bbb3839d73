"""What callers get back from the engine: `RequestOutput`, `CompletionOutput` and, for streams, `Delta`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar


class _Output:
    """Base class of a step's outputs, which are compared and printed by ``fields``.

    The engine keeps appending to its lists of tokens, so an output needs a copy. The copy is made at the first read:
    most outputs are replaced by the next step's before they are read, and copying all tokens in every step would make
    the cost of a sequence quadratic in its length.
    """

    fields: ClassVar[tuple[str, ...]]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.fields)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.fields)
        return f"{type(self).__name__}({values})"


class CompletionOutput(_Output):
    """One generated sequence, as of the step that returned it.

    ``logprobs[i]`` maps token ids to log-probabilities at output position i (``None`` unless requested); the sampled
    token is always among them. ``cumulative_logprob`` is the sum over the sampled tokens. ``finish_reason`` is
    ``"stop"``, ``"length"``, ``"abort"`` (also by a failed step), ``"error"`` if the request failed alone, or ``None``
    while it runs. A beam search lists its best sequence first.
    """

    fields = ("index", "text", "token_ids", "logprobs", "cumulative_logprob", "finish_reason")

    def __init__(
        self,
        index: int,
        text: str,
        token_ids: list[int],
        logprobs: list[dict[int, float]] | None,
        cumulative_logprob: float | None,
        finish_reason: str | None,
        start: int = 0,
        end: int | None = None,
    ) -> None:
        """``token_ids`` may grow later; the output's own tokens are those from ``start`` to ``end``."""
        self.index = index
        self.text = text
        self.logprobs = logprobs
        self.cumulative_logprob = cumulative_logprob
        self.finish_reason = finish_reason
        self._tokens = token_ids
        self._start = start
        self._end = len(token_ids) if end is None else end

    @cached_property
    def token_ids(self) -> list[int]:
        return self._tokens[self._start : self._end]


class RequestOutput(_Output):
    """A request and its sequences so far; ``finished`` once all of them have ended.

    A beam search has no outputs until it is finished. ``prompt_logprobs``, if requested, has an entry per prompt token
    (``None`` for the first token, which has no predecessor). ``error`` is the `RequestFailed` or `StepFailed` that
    ended the request, if one did.
    """

    fields = ("request_id", "prompt", "prompt_token_ids", "outputs", "finished", "prompt_logprobs")

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        outputs: list[CompletionOutput],
        finished: bool,
        prompt_logprobs: list[dict[int, float] | None] | None = None,
        error: Exception | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.outputs = outputs
        self.finished = finished
        self.prompt_logprobs = prompt_logprobs
        self.error = error
        self._prompt_tokens = prompt_token_ids

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        return self._prompt_tokens.copy()


def output_of(request: Any) -> RequestOutput:
    """The `RequestOutput` of a `core.request.Request`: the request and its sequences as they are now."""
    finished, with_logprobs = not request.live, request.params.logprobs is not None
    outputs = [
        CompletionOutput(
            index,
            seq.text.text if seq.text is not None else "",
            seq.tokens,
            list(seq.logprobs) if with_logprobs else None,
            seq.cumulative_logprob if with_logprobs else None,
            seq.finish_reason,
            start=seq.num_prompt,
        )
        for index, seq in enumerate(request.seqs if finished or request.decoding.independent else [])
    ]
    prompt_logprobs = list(request.prompt_logprobs) if request.prompt_logprobs is not None else None
    return RequestOutput(
        request.request_id, request.prompt, request.prompt_token_ids, outputs, finished, prompt_logprobs, request.error
    )


@dataclass(frozen=True)
class Delta:
    """What one step added to sequence ``index``: new text (may be empty), new tokens, and why it ended, if it did."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, float]] | None = None  # of the new tokens, if requested


def differences(output: RequestOutput, seen: dict[int, CompletionOutput]) -> Iterator[Delta]:
    """Yields what is new in each sequence since it was last ``seen``, and updates ``seen``."""
    for out in output.outputs:
        old = seen.get(out.index)
        if old is not None and (old.finish_reason or old == out):
            continue
        chars, tokens = (len(old.text), len(old.token_ids)) if old else (0, 0)
        logprobs = out.logprobs[tokens:] if out.logprobs is not None else None
        yield Delta(out.index, out.text[chars:], out.token_ids[tokens:], out.finish_reason, logprobs)
        seen[out.index] = out
