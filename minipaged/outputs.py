"""What callers get back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from minipaged.request import Request, Sequence


class _CopiedWhenRead:
    """Base of what each step returns. A list of tokens, which the engine goes on appending to, is copied when it is
    first read: most outputs are replaced unread by the next step's, and to copy all tokens in every step would cost a
    long sequence the square of its length.
    """

    @classmethod
    def _made(cls, **fields: Any) -> Self:
        """An instance of these fields; ``_name = (tokens, start, end)`` stands for ``name`` until that is read."""
        output = object.__new__(cls)
        vars(output).update(fields)  # what a frozen dataclass's own __init__ does one by one
        return output

    def __getattr__(self, name: str) -> Any:  # only called for what is not there
        if name.startswith("_") or "_" + name not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        tokens, start, end = vars(self)["_" + name]
        vars(self)[name] = copied = tokens[start:end]
        return copied


@dataclass(frozen=True)
class CompletionOutput(_CopiedWhenRead):
    """One generated sequence, as of the step that returned it.

    ``logprobs[i]`` maps token ids to log-probabilities at output position i (``None`` unless asked for); the sampled
    token is always among them. ``cumulative_logprob`` is the sum over the sampled ones. ``finish_reason`` is
    ``"stop"``, ``"length"``, ``"abort"``, or ``None`` while it runs. Of a beam search they come best first.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    cumulative_logprob: float | None
    finish_reason: str | None

    @classmethod
    def of(cls, index: int, seq: Sequence, asked: bool) -> CompletionOutput:
        """A sequence as it is now; ``asked``: for log-probabilities."""
        return cls._made(
            index=index,
            text=seq.text.text if seq.text is not None else "",
            _token_ids=(seq.tokens, seq.num_prompt, len(seq.tokens)),
            logprobs=list(seq.logprobs) if asked else None,
            cumulative_logprob=seq.cumulative_logprob if asked else None,
            finish_reason=seq.finish_reason,
        )


@dataclass(frozen=True)
class RequestOutput(_CopiedWhenRead):
    """A request and its sequences so far; ``finished`` once all of them have ended.

    A beam search has no outputs until it is finished. ``prompt_logprobs`` has an entry per prompt token (``None`` for
    the first, which nothing precedes), if asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, float] | None] | None = None

    @classmethod
    def of(cls, request: Request) -> RequestOutput:
        asked = request.params.logprobs is not None
        finished = not request.live
        seqs = request.seqs if finished or not request.beams else []
        outputs = [CompletionOutput.of(index, seq, asked) for index, seq in enumerate(seqs)]
        return cls._made(
            request_id=request.request_id,
            prompt=request.prompt,
            _prompt_token_ids=(request.prompt_token_ids, 0, None),
            outputs=outputs,
            finished=finished,
            prompt_logprobs=list(request.prompt_logprobs) if request.prompt_logprobs is not None else None,
        )


@dataclass(frozen=True)
class Delta:
    """What one step added to sequence ``index``: new text (may be empty), new tokens, and the end, if it was that."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, float]] | None = None  # of the new tokens, if asked for


def differences(output: RequestOutput, seen: dict[int, CompletionOutput]) -> Iterator[Delta]:
    """What is new in each sequence since it was last ``seen``, which is brought up to date."""
    for out in output.outputs:
        old = seen.get(out.index)
        if old is not None and (old.finish_reason or old == out):
            continue
        chars, tokens = (len(old.text), len(old.token_ids)) if old else (0, 0)
        logprobs = out.logprobs[tokens:] if out.logprobs is not None else None
        yield Delta(out.index, out.text[chars:], out.token_ids[tokens:], out.finish_reason, logprobs)
        seen[out.index] = out
