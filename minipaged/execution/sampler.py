"""From logits to tokens, for the whole batch at once, one function per filter."""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.config import SamplingParams
from minipaged.request import Request, Sequence
from minipaged.scheduling.plan import Chunk, SampledToken, StepPlan


@torch.inference_mode()
def sample(logits: Tensor, plan: StepPlan) -> list[SampledToken]:
    """The next token of every sequence in ``plan.samples``, in that order.

    logits: [R, vocab], ``num_rows`` rows per chunk; the last of them samples. Where n sequences sample from one row,
    it is repeated. Prompt log-probabilities, where asked for, are written into their request.
    """
    logits = logits.float()
    rows, end = [], 0
    for chunk in plan.chunks:
        end += chunk.num_rows
        rows += [end - 1] * len(chunk.samples)
        if chunk.request.prompt_logprobs is not None:
            _report_prompt(logits[end - chunk.num_rows : end], chunk)
    if not rows:
        return []
    if rows != list(range(len(logits))):
        logits = logits[rows]
    requests = [request for request, _ in plan.samples]
    params = [request.params for request in requests]
    seqs = [seq for _, seq in plan.samples]

    adjusted = _adjust(logits, requests, seqs)
    tokens = adjusted.argmax(dim=-1)
    random = [i for i, p in enumerate(params) if p.temperature > 0]
    if random:
        tokens[random] = _draw(adjusted[random], [params[i] for i in random], [seqs[i] for i in random])
    return [
        SampledToken(token, _logprobs(logits[i], token, request.num_logprobs))
        for i, (token, request) in enumerate(zip(tokens.tolist(), requests, strict=True))
    ]


def _draw(logits: Tensor, params: list[SamplingParams], seqs: list[Sequence]) -> Tensor:
    """One random token per row, by inverting the cumulative distribution at a number from the sequence's own generator.

    One number per token, drawn on the host: what a sequence draws depends on no neighbour and on no device.
    """

    def column(name: str) -> Tensor:  # [rows, 1]
        values = [float(min(getattr(p, name), 1e9)) for p in params]  # a top_k may be any whole number
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    # The likeliest logit becomes 0, so that dividing by the tiniest temperature cannot overflow to infinity there.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    scaled, order = (logits / column("temperature").clamp_min(1e-30)).sort(dim=-1, descending=True)
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


# --- what changes the logits themselves ---


def _adjust(logits: Tensor, requests: list[Request], seqs: list[Sequence]) -> Tensor:
    """Penalties, bias and forbidden endings, for the rows that ask for them. [rows, vocab] → [rows, vocab]."""
    changing = [i for i, request in enumerate(requests) if request.params.changes_logits]
    if changing:
        logits = logits.clone()  # log-probabilities are reported from the original
    for i in changing:
        request, seq = requests[i], seqs[i]
        penalize(logits[i], request.params, seq.tokens, seq.output_tokens)
        for token_id, bias in request.params.logit_bias.items():
            logits[i, token_id] += bias
        if seq.num_output < request.params.min_tokens:
            logits[i, list(request.stop_token_ids)] = -torch.inf
    return logits


def penalize(row: Tensor, params: SamplingParams, tokens: list[int], output: list[int]) -> None:
    """Repetition, presence and frequency penalties, in place. row: [vocab]; ``tokens`` are prompt and output."""
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(tokens)), device=row.device)
        score = row[seen]
        row[seen] = torch.where(score > 0, score / params.repetition_penalty, score * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        unique, times = torch.tensor(output, device=row.device).unique(return_counts=True)
        row[unique] -= params.presence_penalty + params.frequency_penalty * times


# --- what is reported ---


def _logprobs(row: Tensor, token: int, count: int | None) -> dict[int, float] | None:
    """Log-probabilities of the ``count`` likeliest tokens and of ``token``. row: [vocab]."""
    if count is None:
        return None
    logprobs = row.log_softmax(dim=-1)
    top = logprobs.topk(min(count, len(logprobs)))
    entries = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return entries | {token: logprobs[token].item()}


def _report_prompt(rows: Tensor, chunk: Chunk) -> None:
    """Each row foretells the prompt token after its own. rows: [tokens of the chunk, vocab]."""
    request, count = chunk.request, chunk.request.params.prompt_logprobs
    assert request.prompt_logprobs is not None
    for position, row in enumerate(rows, start=chunk.start + 1):
        if position < chunk.seq.num_prompt:
            request.prompt_logprobs[position] = _logprobs(row, chunk.seq.tokens[position], count)
