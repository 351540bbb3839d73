"""Samples tokens from logits with every sampling parameter, for the whole batch at once, one function per filter.

Adds to `execution.sampler` (greedy and temperature): top-k, top-p, min-p, penalties, logit bias, log-probabilities, and
the verification of drafts (`features.speculative`). It plugs in as the engine's ``sampler``. Read `sample` first. The
page shows the log-probabilities of a token's alternatives when you click the token.
"""

from __future__ import annotations

import math
from collections import Counter
from copy import copy
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from minipaged.core.params import SamplingParams
from minipaged.core.plan import Chunk, SampledToken, StepPlan
from minipaged.core.request import Request, Sequence
from minipaged.errors import InvalidRequest
from minipaged.execution.sampler import NOTHING, draw, likeliest, scale, why_nothing

BANNED = -100.0  # a logit_bias this low or lower bans a token (OpenAI's definition)


class FullSampler:
    """`sample`, as the sampler of an engine with this vocabulary and these end-of-text tokens."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.vocab_size, self.eos_token_ids = vocab_size, eos_token_ids

    def check(self, params: SamplingParams) -> None:
        """Raises `InvalidRequest` for parameters that forbid every token."""
        forbidden = {token for token, bias in params.logit_bias.items() if bias <= BANNED}
        why = []
        if forbidden:
            why.append(f"a logit_bias of {BANNED:g} or less bans {len(forbidden)} of {self.vocab_size} tokens")
        if params.min_tokens:
            forbidden.update(params.stop_token_ids, () if params.ignore_eos else self.eos_token_ids)
            why.append(f"min_tokens ({params.min_tokens}) forbids stop and end-of-text tokens, and no other is left")
        if len(forbidden) >= self.vocab_size and forbidden.issuperset(range(self.vocab_size)):
            raise InvalidRequest(f"no token can be drawn: {', '.join(why)}; leave one")

    def __call__(self, logits: Tensor, plan: StepPlan) -> list[SampledToken | None]:
        return sample(logits, plan)


@torch.inference_mode()
def sample(logits: Tensor, plan: StepPlan) -> list[SampledToken | None]:
    """Samples the next token of every sequence in ``plan.samples``, in that order.

    logits: [R, vocab], ``num_rows`` rows per chunk; the last of them is sampled. If n sequences sample from one row, it
    is repeated. A sequence with a draft samples from all its rows up to the first mismatch; rows after it return
    ``None``. A row from which no token can be drawn gets an error, and the others are not affected. Prompt
    log-probabilities, if requested, are written into their request.
    """
    logits = logits.float()
    rows: list[int] = []
    end = 0
    for chunk in plan.chunks:
        end += chunk.num_rows
        rows += range(end - 1 - len(chunk.draft), end) if chunk.draft else [end - 1] * len(chunk.samples)
        if chunk.request.prompt_logprobs is not None:
            _report_prompt(logits[end - chunk.num_rows : end], chunk)
    if not rows:
        return []
    if rows != list(range(len(logits))):
        logits = logits[rows]
    samples = plan.samples
    requests, seqs = [request for request, _ in samples], [seq for _, seq in samples]
    params = [request.params for request in requests]
    drafted = any(chunk.draft for chunk in plan.chunks)
    if drafted:
        seqs = _foreseen(plan)

    adjusted = adjust(logits, requests, seqs)
    tokens, drawable = likeliest(adjusted)
    random = [i for i, p in enumerate(params) if p.temperature > 0]
    if random:
        tokens[random] = _draw(adjusted[random], [params[i] for i in random], [seqs[i] for i in random])
    chosen = tokens.where(drawable, NOTHING).tolist()  # the host waits for the device, once for the whole batch
    kept = _accept(plan, adjusted, chosen) if drafted else [True] * len(chosen)
    logprobs = _logprobs(logits, chosen, [request.decoding.num_logprobs for request in requests])
    return [
        SampledToken(token, logprobs[row], why_nothing(token, logits, row)) if keep else None
        for row, (token, keep) in enumerate(zip(chosen, kept, strict=True))
    ]


def _draw(logits: Tensor, params: list[SamplingParams], seqs: list[Sequence]) -> Tensor:
    """Draws one random token per row. logits: [rows, vocab], adjusted → [rows]."""
    kept, order = _filtered(logits, params)
    return order.gather(1, draw(kept, seqs)[:, None])[:, 0]


def distribution(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """The probabilities that `_draw` samples from. logits: [rows, vocab], adjusted → [rows, vocab]."""
    kept, order = _filtered(logits, params)
    return torch.zeros_like(kept).scatter_(1, order, kept.softmax(dim=-1))


def _filtered(logits: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The scaled logits that the filters keep, else -inf, and the token id of each entry; both are [rows, vocab].

    A row with a filter is sorted, likeliest first. Other rows stay in the order of the vocabulary, because sorting them
    would take longer than all the rest of the draw.
    """

    def column(name: str) -> Tensor:  # [rows, 1]
        values = [float(min(getattr(p, name), 1e9)) for p in params]  # a top_k may be arbitrarily large
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    scaled = scale(logits, params)
    order = torch.arange(scaled.shape[1], device=logits.device).expand(scaled.shape)
    filtering = [i for i, p in enumerate(params) if p.top_k != 0 or p.top_p != 1 or p.min_p != 0]
    if filtering:
        rows = torch.tensor(filtering, device=logits.device)
        order = order.clone()
        kept, order[rows] = scaled[rows].sort(dim=-1, descending=True)
        for name, off, mask in (("top_k", 0, top_k_mask), ("top_p", 1, top_p_mask), ("min_p", 0, min_p_mask)):
            if any(getattr(p, name) != off for p in params):
                kept = kept.masked_fill(~mask(kept, column(name)[rows]), -torch.inf)
        scaled[rows] = kept
    return scaled, order


# Each mask is True for entries to keep. Rows are sorted, likeliest first; entries dropped before are -inf.


def top_k_mask(scaled: Tensor, k: Tensor) -> Tensor:
    """Keeps the k likeliest; 0 keeps all. scaled: [rows, vocab]; k: [rows, 1]."""
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    return (rank < k) | (k == 0)


def top_p_mask(scaled: Tensor, p: Tensor) -> Tensor:
    """Keeps the likeliest until their probabilities reach p, including the one that crosses it. p: [rows, 1]."""
    probs = scaled.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    mask = (before < p) | (p >= 1)  # exactly unfiltered at 1, whatever the rounding
    mask[:, 0] = True
    return mask


def min_p_mask(scaled: Tensor, min_p: Tensor) -> Tensor:
    """Keeps tokens at least min_p times as likely as the likeliest. min_p: [rows, 1]."""
    return scaled >= scaled[:, :1] + min_p.log()  # log 0 = -inf keeps all


# --- drafts ---


def _foreseen(plan: StepPlan) -> list[Sequence]:
    """The sequences of ``plan.samples``; row i of a drafting sequence has the first i draft tokens appended.

    They draw from a copy of its generator: random numbers drawn after the first mismatch must not count.
    """
    seqs: list[Sequence] = []
    for chunk in plan.chunks:
        rng = copy(chunk.seq.rng) if chunk.draft else chunk.seq.rng
        for i, seq in enumerate(chunk.samples):
            seqs.append(replace(seq, tokens=seq.tokens + chunk.draft[:i], rng=rng) if chunk.draft else seq)
    return seqs


def _accept(plan: StepPlan, logits: Tensor, chosen: list[int]) -> list[bool]:
    """Mask of accepted rows: a draft is accepted up to its first mismatch, whose own token is kept too.

    logits: [rows, vocab], adjusted. ``chosen`` holds the tokens drawn from them; it is overwritten for drafts that were
    drawn at random. If only one guess was possible, drawing a token and comparing it *is* rejection sampling.
    """
    kept: list[bool] = []
    for chunk in plan.chunks:
        start, end, draft = len(kept), len(kept) + len(chunk.samples), chunk.draft
        if draft and chunk.draft_probs is not None:
            # Up to the first row from which nothing can be drawn; it matters if the draft is accepted up to there.
            known = next((i for i, token in enumerate(chosen[start:end]) if token == NOTHING), len(draft))
            failing = chosen[start + known] == NOTHING
            probs = distribution(logits[start : start + known + 1], [chunk.request.params] * (known + 1))
            said = rejection_sample(probs, chunk.draft_probs, draft[:known], chunk.seq.rng)
            if failing and len(said) > known:
                said[known] = NOTHING
            chosen[start : start + len(said)] = said
            kept += [True] * len(said)
        elif draft:
            right = next((i for i, token in enumerate(draft) if chosen[start + i] != token), len(draft))
            if chunk.request.params.temperature > 0:
                for _ in range(right + 1):
                    chunk.seq.rng.random()
            kept += [True] * (right + 1)
        kept += [not draft] * (end - len(kept))
    return kept


def rejection_sample(target: Tensor, guess: Tensor, draft: list[int], rng: Random) -> list[int]:
    """Rejection sampling: tokens distributed as ``target``, from the draft if possible (Leviathan et al. 2023, alg. 1).

    target: [k + 1, vocab], guess: [k, vocab], probabilities; draft: k tokens, drawn from ``guess``. Returns the
    accepted tokens and one more: it replaces the first rejected token, or follows the whole draft.
    """
    for i, token in enumerate(draft):
        if rng.random() * guess[i, token] >= target[i, token]:
            rest = (target[i] - guess[i]).clamp_min(0)
            return [*draft[:i], _pick(rest if rest.any() else target[i], rng)]
    return [*draft, _pick(target[-1], rng)]


def _pick(weights: Tensor, rng: Random) -> int:
    """Draws an index in proportion to its weight; never one of weight 0, whatever the rounding."""
    cumulative = weights.double().cumsum(dim=0)
    index = torch.searchsorted(cumulative, rng.random() * cumulative[-1:], right=True)
    return int(index.clamp_max(int(weights.nonzero()[-1])))


# --- what changes the logits themselves ---


def adjust(logits: Tensor, requests: list[Request], seqs: list[Sequence]) -> Tensor:
    """Applies penalties, logit bias and ``min_tokens`` to the rows that ask for them. [rows, vocab] → [rows, vocab].

    The host knows which tokens a sequence holds, so the batch takes two scatters and never waits for the device.
    """
    divided: list[tuple[int, int, float]] = []  # row, token, what its logit is divided by
    added: list[tuple[int, int, float]] = []  # row, token, what is added to it
    for row, (request, seq) in enumerate(zip(requests, seqs, strict=True)):
        params = request.params
        if not params.changes_logits:
            continue
        if params.repetition_penalty != 1:
            divided += [(row, token, params.repetition_penalty) for token in set(seq.tokens)]
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(seq.output_tokens)
            added += [(row, t, -params.presence_penalty - params.frequency_penalty * n) for t, n in counts.items()]
        added += [(row, token, bias) for token, bias in params.logit_bias.items()]
        if seq.num_output < params.min_tokens:
            added += [(row, token, -math.inf) for token in request.stop_token_ids]
    if divided or added:
        logits = logits.clone()  # log-probabilities are reported from the original
    if divided:
        at, penalty = _entries(divided, logits.device)
        score = logits[at]
        logits[at] = torch.where(score > 0, score / penalty, score * penalty)  # always less likely than before
    if added:
        at, amount = _entries(added, logits.device)
        logits.index_put_(at, amount, accumulate=True)
    return logits


def _entries(entries: list[tuple[int, int, float]], device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(row, token, value) → the index of these entries of a matrix, and their values."""
    rows, tokens, values = zip(*entries, strict=True)
    amounts = torch.tensor([float(value) for value in values], device=device)  # users may pass ints
    return (torch.tensor(rows, device=device), torch.tensor(tokens, device=device)), amounts


# --- what is reported ---


def _logprobs(logits: Tensor, tokens: list[int], counts: list[int | None]) -> list[dict[int, float] | None]:
    """Log-probabilities of each row's ``counts[i]`` likeliest tokens and of ``tokens[i]``; ``None`` if not requested.

    logits: [rows, vocab]. Computes all rows together, so that the host waits a fixed number of times, not once per row.
    """
    asked = [i for i, count in enumerate(counts) if count is not None]
    entries: list[dict[int, float] | None] = [None] * len(counts)
    if not asked:
        return entries
    logprobs = logits[asked].log_softmax(dim=-1)
    most = min(max(counts[i] or 0 for i in asked), logits.shape[1])
    top = logprobs.topk(most)
    own = logprobs.gather(1, torch.tensor([[max(tokens[i], 0)] for i in asked], device=logits.device))[:, 0]
    for i, ids, values, value in zip(asked, top.indices.tolist(), top.values.tolist(), own.tolist(), strict=True):
        best = dict(zip(ids[: counts[i]], values[: counts[i]], strict=True))
        entries[i] = best | {tokens[i]: value}
    return entries


def _report_prompt(rows: Tensor, chunk: Chunk) -> None:
    """Reports prompt log-probabilities: each row predicts the next prompt token. rows: [tokens of the chunk, vocab]."""
    request, count = chunk.request, chunk.request.params.prompt_logprobs
    assert request.prompt_logprobs is not None
    foretold = chunk.seq.tokens[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, chunk.seq.num_prompt)]
    entries = _logprobs(rows[: len(foretold)], foretold, [count] * len(foretold))
    request.prompt_logprobs[chunk.start + 1 : chunk.start + 1 + len(foretold)] = entries
