"""What callers get back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minipaged.request import Request


@dataclass(frozen=True)
class CompletionOutput:
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


@dataclass(frozen=True)
class RequestOutput:
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
        outputs = [
            CompletionOutput(
                index=index,
                text=seq.text.text if seq.text is not None else "",
                token_ids=seq.output_tokens,
                logprobs=list(seq.logprobs) if asked else None,
                cumulative_logprob=seq.cumulative_logprob if asked else None,
                finish_reason=seq.finish_reason,
            )
            for index, seq in enumerate(request.seqs if finished or not request.beams else [])
        ]
        prompt_logprobs = list(request.prompt_logprobs) if request.prompt_logprobs is not None else None
        prompt_token_ids = list(request.prompt_token_ids)  # the caller may do with it what it likes
        return cls(request.request_id, request.prompt, prompt_token_ids, outputs, finished, prompt_logprobs)


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
