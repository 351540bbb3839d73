"""From logits to tokens, for the whole batch at once, one function per filter."""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.config import SamplingParams
from minipaged.request import Sequence
from minipaged.scheduling.plan import SampledToken, StepPlan


@torch.inference_mode()
def sample(logits: Tensor, plan: StepPlan) -> list[SampledToken]:
    """The next token of every sequence in ``plan.samples``, in that order.

    logits: [R, vocab], a row per sampling chunk. Where n sequences sample from one row, the row is repeated.
    """
    sampling = [chunk for chunk in plan.chunks if chunk.samples]
    rows = [row for row, chunk in enumerate(sampling) for _ in chunk.samples]
    if len(rows) > len(sampling):
        logits = logits[rows]
    logits = logits.float()
    params = [request.params for request, _ in plan.samples]
    seqs = [seq for _, seq in plan.samples]

    tokens = logits.argmax(dim=-1)
    random = [i for i, p in enumerate(params) if p.temperature > 0]
    if random:
        tokens[random] = _draw(logits[random], [params[i] for i in random], [seqs[i] for i in random])
    chosen = tokens.tolist()
    reported = _logprobs(logits, chosen, params)
    return [SampledToken(token, reported.get(i)) for i, token in enumerate(chosen)]


def _draw(logits: Tensor, params: list[SamplingParams], seqs: list[Sequence]) -> Tensor:
    """One random token per row, by inverting the cumulative distribution at a number from the sequence's own generator.

    One number per token, drawn on the host: what a sequence draws depends on no neighbour and on no device.
    """

    def column(name: str) -> Tensor:  # [rows, 1]
        return torch.tensor([getattr(p, name) for p in params], device=logits.device, dtype=torch.float32)[:, None]

    scaled, order = (logits / column("temperature")).sort(dim=-1, descending=True)
    kept = scaled.masked_fill(~top_k_mask(scaled, column("top_k")), -torch.inf)
    kept = kept.masked_fill(~top_p_mask(kept, column("top_p")), -torch.inf)
    kept = kept.masked_fill(~min_p_mask(kept, column("min_p")), -torch.inf)
    cumulative = kept.softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.tensor([[seq.rng.random()] for seq in seqs], device=logits.device, dtype=torch.float32)
    # The first rank whose cumulative probability exceeds the number; rounding must not lead past the last one kept.
    rank = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    rank = rank.minimum((kept > -torch.inf).sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, rank)[:, 0]


# Each mask says which entries stay. Rows come sorted, likeliest first; what an earlier filter dropped is -inf.


def top_k_mask(scaled: Tensor, k: Tensor) -> Tensor:
    """The k likeliest; 0 keeps all. scaled: [rows, vocab]; k: [rows, 1]."""
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    return (rank < k) | (k == 0)


def top_p_mask(scaled: Tensor, p: Tensor) -> Tensor:
    """The likeliest until their probabilities reach p, the one that crosses it included. p: [rows, 1]."""
    probs = scaled.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    mask = (before < p) | (p >= 1)  # exactly unfiltered at 1, whatever the rounding
    mask[:, 0] = True
    return mask


def min_p_mask(scaled: Tensor, min_p: Tensor) -> Tensor:
    """Those at least min_p times as likely as the likeliest. min_p: [rows, 1]."""
    return scaled >= scaled[:, :1] + min_p.log()  # log 0 = -inf keeps all


def _logprobs(logits: Tensor, chosen: list[int], params: list[SamplingParams]) -> dict[int, dict[int, float]]:
    """For each row that asked: the log-probabilities of the chosen token and of the likeliest ones."""
    asking = [i for i, p in enumerate(params) if p.logprobs is not None]
    reported: dict[int, dict[int, float]] = {}
    for i in asking:
        logprobs = logits[i].log_softmax(dim=-1)
        top = logprobs.topk(min(params[i].logprobs or 0, logprobs.numel()))
        entries = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        reported[i] = entries | {chosen[i]: logprobs[chosen[i]].item()}
    return reported
