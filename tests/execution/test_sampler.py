"""The sampler: filters against transformers' logits processors, distributions by chi-square tests, exact edge cases."""

from fractions import Fraction
from random import Random

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minipaged.config import SamplingParams
from minipaged.core.plan import Chunk, StepPlan
from minipaged.core.request import Request, Sequence
from minipaged.core.seams import Sampling
from minipaged.errors import InvalidRequest, RequestFailed
from minipaged.execution.sampler import Sampler
from minipaged.features.full_sampler import FullSampler, adjust, distribution, sample

VOCAB = 40


def plan_for(all_params, seeds=None):
    """A plan with one row of logits per element of ``all_params``."""
    plan = StepPlan(0)
    for i, params in enumerate(all_params):
        seq = Sequence(i, [1], 1, Random(seeds[i] if seeds else i))
        request = Request(
            str(i), [1], params, [seq], frozenset(params.stop_token_ids), 99, i, Sampling(params, frozenset())
        )
        plan.chunks.append(Chunk(request, seq, 0, 1, [seq], [0]))
    return plan


def draws(logits, params, count):
    """Token counts in ``count`` draws from one distribution."""
    plan = plan_for([params] * count)
    tokens = [s.token_id for s in sample(logits.expand(count, -1), plan)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel())


def logits_of(seed):
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


FILTERS = [
    ({"top_k": 5}, [TopKLogitsWarper(5)]),
    ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
    ({}, []),
    (
        {"temperature": 0.6, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        [TemperatureLogitsWarper(0.6), TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
    ),
]


@pytest.mark.parametrize("settings, warpers", FILTERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_the_distribution_that_transformers_filters(settings, warpers, seed):
    logits = logits_of(seed)
    expected = logits[None].clone()
    for warper in warpers:
        expected = warper(None, expected)
    probs = expected.softmax(-1)[0].double()
    count = 20_000
    seen = draws(logits, SamplingParams(**settings), count).double()
    assert seen[probs == 0].sum() == 0, "a filtered token was drawn"
    alive = probs * count >= 5  # the test's approximation needs a few expected draws in each cell
    chi2 = ((seen - probs * count)[alive] ** 2 / (probs * count)[alive]).sum().item()
    freedom = int(alive.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 4, f"chi-square {chi2:.1f} at {freedom} degrees of freedom"


class Given:
    """A stand-in for a sequence's random generator, which returns one given number."""

    def __init__(self, number):
        self.numbers = [number]

    def random(self):
        return self.numbers.pop()


def drawn_at(logits, all_params, numbers):
    """The token that is drawn from each row with the row's random number."""
    plan = plan_for(all_params)
    for (_, seq), number in zip(plan.samples, numbers, strict=True):
        seq.rng = Given(number)
    return [s.token_id for s in sample(logits, plan)]


LAST = 1 - 2.0**-53  # the largest number that Random.random() returns
ONLY = [0, 1, 5, 20, 21]  # tokens


def only(logits, tokens=ONLY):
    """The same logits with all tokens except ``tokens`` forbidden (-inf)."""
    return torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(tokens), logits[tokens])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.05}])
@pytest.mark.parametrize("forbid", [lambda row: row, only], ids=["all tokens", "few tokens"])
def test_a_token_is_drawn_by_the_numbers_in_its_part_of_the_cumulative_distribution(settings, forbid):
    row, params = forbid(logits_of(5)), SamplingParams(**settings)
    (probs,) = distribution(row[None], [params]).double()
    order = probs.argsort(descending=True) if settings.keys() - {"temperature"} else torch.arange(VOCAB)
    numbers = [i / 2000 for i in range(2000)] + [LAST]
    tokens = torch.tensor(drawn_at(row.expand(2001, -1), [params] * 2001, numbers))
    upper = torch.zeros(VOCAB).double().index_copy(0, order, probs[order].cumsum(0) / probs.sum())[tokens]
    lower, u = upper - probs[tokens], torch.tensor(numbers).double()
    assert (lower - 1e-6 <= u).all() and (u <= upper + 1e-6).all()
    assert (probs[tokens] > 0).all() and tokens[-1] == order[probs[order] > 0][-1]


def test_no_number_leads_to_a_forbidden_token():
    """At the ends of the vocabulary, in its middle, where rounding of the sums is largest, and beyond its end."""
    flat = torch.zeros(50_000)
    allowed = [3, *range(100, 40_000, 7)]
    rows = torch.stack([flat, only(flat, allowed), only(flat, [49_999]), only(flat, [0])]).repeat_interleave(3, dim=0)
    for settings in ({}, {"temperature": 1e-30}, {"top_p": 0.999999}):
        tokens = drawn_at(rows, [SamplingParams(**settings)] * 12, [0.0, 1 - 2.0**-24, LAST] * 4)
        assert set(tokens[3:6]) <= set(allowed) and tokens[6:] == [49_999] * 3 + [0] * 3
        if "top_p" not in settings:
            assert tokens[:6] == [0, 49_999, 49_999, 3, allowed[-1], allowed[-1]]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_from_which_nothing_can_be_drawn_fails_alone(settings, bad):
    logits = torch.stack([logits_of(0), logits_of(1), logits_of(2)])
    logits[1, slice(None) if bad < 0 else 3] = bad
    for params in (SamplingParams(**settings), SamplingParams(temperature=0, **settings)):
        plans = [plan_for([params] * 3) for _ in range(2)]
        good, failed, other = sample(logits, plans[0])
        assert isinstance(failed.error, RequestFailed) and "NaN or infinite" in str(failed.error)
        expected = sample(logits_of(0).expand(3, -1), plans[1])[0], sample(logits[2:], plan_for([params], [2]))[0]
        assert (good.token_id, other.token_id) == tuple(token.token_id for token in expected)
        assert good.error is other.error is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_hearts_own_sampler_fails_such_a_row_alone(bad):
    logits = torch.stack([logits_of(0), logits_of(1)])
    logits[1] = bad
    for temperature in (0, 1):
        good, failed = Sampler()(logits, plan_for([SamplingParams(temperature=temperature)] * 2))
        assert good.error is None and 0 <= good.token_id < VOCAB and "NaN or infinite" in str(failed.error)


def test_masks_that_leave_no_token_are_named():
    params = SamplingParams(min_tokens=1, stop_token_ids=[3], logprobs=2)
    (failed,) = sample(only(logits_of(0), [3])[None], plan_for([params]))
    assert "min_tokens, stop_token_ids and logit_bias" in str(failed.error)


ALL = list(range(VOCAB))


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 1, "stop_token_ids": ALL},
        {"min_tokens": 1, "stop_token_ids": ALL[2:]},  # the end-of-text tokens are 0 and 1
        {"logit_bias": dict.fromkeys(ALL, -100)},
        {"logit_bias": dict.fromkeys(ALL[:30], -1e9), "min_tokens": 2, "stop_token_ids": ALL[30:]},
    ],
)
def test_parameters_that_forbid_every_token_are_refused(params):
    door = FullSampler(VOCAB, frozenset({0, 1}))
    with pytest.raises(InvalidRequest, match="no token can be drawn: (a logit_bias .* of 40|min_tokens .* forbids)"):
        door.check(SamplingParams(**params))


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": ALL},
        {"min_tokens": 1, "stop_token_ids": ALL[2:], "ignore_eos": True},
        {"min_tokens": 1, "stop_token_ids": ALL[3:]},
        {"logit_bias": dict.fromkeys(ALL, -99.9)},  # the same for all: it changes nothing
    ],
)
def test_parameters_that_leave_a_token_are_not(params):
    FullSampler(VOCAB, frozenset({0, 1})).check(SamplingParams(**params))


def test_temperature_zero_is_greedy_whatever_else_is_set():
    logits = torch.stack([logits_of(i) for i in range(8)])
    params = [SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.5, seed=i) for i in range(8)]
    assert [s.token_id for s in sample(logits, plan_for(params))] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_greedy_choice_is_the_first_of_equal_logits(dtype):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).round().to(dtype).requires_grad_()
    tokens = [s.token_id for s in sample(logits, plan_for([SamplingParams(temperature=0)] * 64))]
    assert tokens == [row.index(max(row)) for row in logits.tolist()]


def test_settings_that_filter_nothing_leave_every_token_reachable():
    logits = torch.zeros(VOCAB)
    for settings in ({}, {"top_k": VOCAB}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert (draws(logits, SamplingParams(**settings), 4000) > 0).all(), settings


def test_top_k_one_and_a_tiny_top_p_are_greedy():
    logits = logits_of(3)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert draws(logits, SamplingParams(**settings), 50)[logits.argmax()] == 50


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = torch.stack([logits_of(i) for i in range(6)])
    mixed = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(min_p=0.2),
    ]
    for seed in range(20):
        seeds = range(seed, seed + 6)
        together = [s.token_id for s in sample(logits, plan_for(mixed, seeds))]
        alone = [sample(logits[i : i + 1], plan_for([mixed[i]], [seeds[i]]))[0].token_id for i in range(6)]
        assert together == alone
    assert distribution(logits[2:], mixed[2:]).equal(
        torch.cat([distribution(logits[i : i + 1], [mixed[i]]) for i in range(2, 6)])
    )


def test_logprobs_are_the_models_own_before_any_filter():
    logits = torch.stack([logits_of(0), logits_of(1)])
    params = [SamplingParams(logprobs=3, temperature=0.1, top_k=1), SamplingParams()]
    first, second = sample(logits, plan_for(params))
    truth = logits[0].log_softmax(-1)
    assert second.logprobs is None
    assert first.logprobs.keys() == set(truth.topk(3).indices.tolist()) | {first.token_id}
    for token, logprob in first.logprobs.items():
        assert logprob == pytest.approx(truth[token].item(), abs=1e-5)


def test_zero_logprobs_report_only_the_sampled_token():
    (only,) = sample(logits_of(0)[None], plan_for([SamplingParams(logprobs=0)]))
    assert only.logprobs.keys() == {only.token_id}


def adjusted(rows, all_params, tokens, num_prompt):
    """Rows of logits after penalties, for sequences with these tokens."""
    seqs = [Sequence(i, list(tokens), num_prompt, Random(0)) for i in range(len(all_params))]
    requests = [
        Request(
            str(i),
            list(tokens[:num_prompt]),
            params,
            [seq],
            frozenset(params.stop_token_ids),
            99,
            i,
            Sampling(params, frozenset()),
        )
        for i, (params, seq) in enumerate(zip(all_params, seqs, strict=True))
    ]
    return adjust(rows, requests, seqs)


def test_the_repetition_penalty_equals_transformers():
    tokens, row = [3, 5, 5, 9, 30], logits_of(4)
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([tokens]), row[None].clone())
    torch.testing.assert_close(adjusted(row[None], [SamplingParams(repetition_penalty=1.4)], tokens, 3), expected)


def test_presence_and_frequency_count_output_tokens_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    (row,) = adjusted(torch.zeros(1, VOCAB), [params], [1, 2, 2, 3], 1)
    assert row[1] == 0 and row[2] == -1.0 and row[3] == -0.75


def test_each_row_is_adjusted_by_its_own_request_and_all_that_it_asks_for():
    rows = torch.stack([logits_of(i) for i in range(4)])
    both = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {5: 3.0}}
    params = [
        SamplingParams(),
        SamplingParams(**both, min_tokens=9, stop_token_ids=[7]),
        SamplingParams(logit_bias={7: -2.0}),
        SamplingParams(presence_penalty=1.0),
    ]
    out = adjusted(rows, params, [3, 5, 5], 1)
    assert out[0].equal(rows[0]), "another request's penalties changed a row that has none"
    truth = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[3, 5, 5]]), rows[1:2].clone())[0]
    truth[5] += 3.0 - 2 * 0.5
    truth[7] = -torch.inf
    torch.testing.assert_close(out[1], truth)
    assert out[2, 7] == rows[2, 7] - 2 and out[3, 5] == rows[3, 5] - 1 and out[3, 3] == rows[3, 3]


def test_the_host_waits_for_the_device_as_often_for_many_sequences_as_for_one(monkeypatch):
    waits = 0

    def counting(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args):
            nonlocal waits
            waits += 1
            return original(self, *args)

        return method

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    settings = {"logprobs": 3, "repetition_penalty": 1.2, "presence_penalty": 0.1, "top_p": 0.9}
    costs = []
    for count in (1, 16):
        waits = 0
        sample(logits_of(0).expand(count, -1), plan_for([SamplingParams(**settings)] * count))
        costs.append(waits)
    assert costs[0] == costs[1] > 0


def test_penalties_bias_and_min_tokens_reach_the_choice_but_not_the_logprobs():
    logits = torch.zeros(4, VOCAB)
    logits[:, 1] = 5.0  # the prompt's own token has the largest logit
    logits[:, 2] = 4.0
    params = [
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, logprobs=0, repetition_penalty=2.0),
        SamplingParams(temperature=0, logprobs=0, logit_bias={7: 9.0}),
        SamplingParams(temperature=0, logprobs=0, min_tokens=1, stop_token_ids=[1]),
    ]
    tokens = sample(logits, plan_for(params))
    assert [token.token_id for token in tokens] == [1, 2, 7, 2]
    truth = logits[0].log_softmax(-1)
    for token in tokens:
        assert token.logprobs[token.token_id] == pytest.approx(truth[token.token_id].item())


@pytest.mark.parametrize("settings", [{"temperature": 1e-46}, {"temperature": 1e-38}, {"top_k": 10**400}])
def test_extreme_but_accepted_values_do_not_fail_the_batch(settings):
    logits = logits_of(0)[None].repeat(2, 1)
    extreme, plain = sample(logits, plan_for([SamplingParams(**settings), SamplingParams(temperature=0)]))
    assert plain.token_id == logits[0].argmax()
    if "temperature" in settings:
        assert extreme.token_id == logits[0].argmax()


def test_penalties_and_biases_may_be_whole_numbers_and_fractions():
    """`SamplingParams` accepts any real number, so the sampler must too, also when the batch has no other request."""

    def bent(**changes):
        requests = [chunk.request for chunk in plan_for([SamplingParams(**changes)]).chunks]
        seqs = [requests[0].seqs[0]]
        seqs[0].tokens += [4, 4, 5]
        return adjust(logits_of(0)[None].clone(), requests, seqs)

    exact = [
        ({"logit_bias": {5: 10}}, {"logit_bias": {5: 10.0}}),
        ({"logit_bias": {5: Fraction(1, 2)}}, {"logit_bias": {5: 0.5}}),
        ({"presence_penalty": 1, "frequency_penalty": 2}, {"presence_penalty": 1.0, "frequency_penalty": 2.0}),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),
        ({"repetition_penalty": Fraction(3, 2)}, {"repetition_penalty": 1.5}),
    ]
    for given, meant in exact:
        assert bent(**given).equal(bent(**meant)) and not bent(**given).equal(bent()), given
