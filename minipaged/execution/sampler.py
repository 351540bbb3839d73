"""Samples tokens from logits: greedy or with a temperature. `features.full_sampler` supports the other parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.core.params import SamplingParams
from minipaged.core.plan import SampledToken, StepPlan
from minipaged.core.request import Sequence
from minipaged.errors import InvalidRequest, RequestFailed  # typed errors

NOTHING = -1  # stands for the token of a row from which none can be drawn


class Sampler:
    """The heart's sampler: the next token of every sequence in ``plan.samples``, in that order. It knows no drafts."""

    @staticmethod
    def check(params: SamplingParams) -> None:
        """Raises `InvalidRequest` for parameters that need `features.full_sampler`."""
        known = SamplingParams(temperature=params.temperature)
        names = ("top_k", "top_p", "min_p", "logprobs", "prompt_logprobs")
        asked = [name for name in names if getattr(params, name) != getattr(known, name)]
        if asked or params.changes_logits:
            more = ", ".join(asked) or "penalties, logit_bias and min_tokens"
            raise InvalidRequest(f"{more}: this engine supports only greedy sampling and temperature; leave these out")

    @torch.inference_mode()
    def __call__(self, logits: Tensor, plan: StepPlan) -> list[SampledToken]:
        """Samples from logits [R, vocab], a row per sampling chunk; a row that n sequences share is sampled n times."""
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        rows = [row for row, chunk in enumerate(sampling) for _ in chunk.samples]
        if not rows:
            return []
        logits = logits.float()[rows]
        tokens, drawable = likeliest(logits)
        requests, seqs = zip(*plan.samples, strict=True)
        params = [request.params for request in requests]
        random = [i for i, p in enumerate(params) if p.temperature > 0]
        if random:
            scaled = scale(logits[random], [params[i] for i in random])
            tokens[random] = draw(scaled, [seqs[i] for i in random])
        chosen = tokens.where(drawable, NOTHING).tolist()  # tolist: the host waits for the device
        return [SampledToken(token, error=why_nothing(token, logits, row)) for row, token in enumerate(chosen)]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's largest entry, the first of equal ones, and whether it is finite; both are [rows].

    If it is not, no token can be drawn from the row: all entries are -inf, or one is NaN, which counts as the largest.
    """
    on_cpu = logits.device.type == "cpu"  # where numpy needs a third of torch's time
    tokens = torch.as_tensor(logits.detach().numpy().argmax(axis=-1) if on_cpu else logits.argmax(dim=-1))
    return tokens, logits.gather(1, tokens[:, None])[:, 0].isfinite()


def why_nothing(token: int, logits: Tensor, row: int) -> RequestFailed | None:
    """Why no token could be drawn from a row of the model's own logits, [rows, vocab]; ``None`` if one was."""
    if token != NOTHING:
        return None
    why = "the model's logits are NaN or infinite; check its weights, or load them with dtype='float32'"
    if logits[row].isfinite().any() and (logits[row] < torch.inf).all():
        why = "min_tokens, stop_token_ids and logit_bias together forbid every token; leave one"
    return RequestFailed(f"no token can be drawn: {why}")


def scale(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Divides each row by its temperature. [rows, vocab] → [rows, vocab]."""
    temperatures = torch.tensor([p.temperature for p in params], device=logits.device, dtype=torch.float32)[:, None]
    # The largest logit becomes 0, so that dividing it by a tiny temperature cannot overflow to infinity.
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperatures.clamp_min(1e-30)


def draw(scaled: Tensor, seqs: list[Sequence]) -> Tensor:
    """Samples one column per row, by inverting the cumulative distribution at a number from the sequence's generator.

    One number per token, drawn on the host: it depends on neither the batch nor the device (logits do, by rounding).
    scaled: [rows, vocab], logits → [rows].
    """
    # In double precision where supported. A GPU sums each entry in a different order, so rounding may make the sum grow
    # at a token of probability 0, and in single precision this is frequent enough for such a token to be sampled.
    dtype = torch.float32 if scaled.device.type == "mps" else torch.float64
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=dtype)
    total = cumulative[:, -1:].contiguous()
    uniform = torch.tensor([[seq.rng.random()] for seq in seqs], device=scaled.device, dtype=dtype)
    # The first entry whose cumulative probability exceeds the number, but at most the last one of probability > 0.
    rank = torch.searchsorted(cumulative, uniform * total, right=True)
    return rank.minimum(torch.searchsorted(cumulative, total)).clamp_max(scaled.shape[1] - 1)[:, 0]  # a row may be NaN
