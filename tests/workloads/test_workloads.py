"""Workload generators follow their documented distributions and are reproducible."""

from collections import defaultdict
from itertools import islice
from statistics import fmean, stdev

import pytest

from minipaged.workloads import (
    alpaca_like,
    at_once,
    chat,
    gamma,
    poisson,
    shared_prefix,
    sharegpt_like,
    trace,
    translation_like,
)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "lengths, prompt, output",
    [(sharegpt_like, 161.31, 337.99), (alpaca_like, 19.31, 58.45)],
    ids=["ShareGPT", "Alpaca"],
)
def test_means_are_the_papers_within_two_percent(lengths, prompt, output, seed):
    pairs = list(islice(lengths(seed), 40_000))
    assert fmean(p for p, _ in pairs) == pytest.approx(prompt, rel=0.02)
    assert fmean(o for _, o in pairs) == pytest.approx(output, rel=0.02)


@pytest.mark.parametrize("lengths", [sharegpt_like, alpaca_like, translation_like])
def test_lengths_stay_within_what_the_model_can_hold_and_repeat(lengths):
    pairs = list(islice(lengths(3), 5000))
    assert all(p >= 4 and o >= 4 and p + o <= 2048 for p, o in pairs)
    assert pairs == list(islice(lengths(3), 5000)) != list(islice(lengths(4), 5000))


@pytest.mark.parametrize("cv", [1.0, 1.41, 3.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv):
    times = list(gamma(2.0, cv, 20_000, seed=0))
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert times == sorted(times) and times[-1] < 20_000
    assert len(times) / 20_000 == pytest.approx(2.0, rel=0.05)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_poisson_is_gamma_without_bursts():
    assert list(poisson(1.5, 100, seed=7)) == list(gamma(1.5, 1.0, 100, seed=7)) != list(poisson(1.5, 100, seed=8))


@pytest.mark.parametrize("rate, cv, duration", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1), (float("nan"), 1, 1)])
def test_arrivals_refuse_what_is_no_rate(rate, cv, duration):
    with pytest.raises(ValueError, match="positive"):
        gamma(rate, cv, duration, seed=0)


def test_a_trace_is_as_long_as_its_times_and_says_how_to_decode():
    requests = trace(alpaca_like(0), at_once(5), n=4)
    assert [(r.arrival, r.n, r.beam_width) for r in requests] == [(0.0, 4, None)] * 5
    assert [(r.num_prompt, r.num_output) for r in requests] == list(islice(alpaca_like(0), 5))
    assert {r.beam_width for r in trace(alpaca_like(0), at_once(3), beam_width=6)} == {6}


def test_independent_prompts_have_no_block_in_common_and_samples_differ():
    a, b = trace(sharegpt_like(0), at_once(2))
    tokens = a.token_ids(50_000)
    assert len(tokens) == a.num_prompt and tokens == a.token_ids(50_000)
    assert all(0 <= token < 50_000 for token in tokens)
    assert not set(zip(tokens, tokens[1:], strict=False)) & set(
        zip(b.token_ids(50_000), b.token_ids(50_000)[1:], strict=False)
    )
    assert len({a.token(a.num_prompt, 50_000, sample) for sample in range(4)}) == 4


def test_prefixes_are_shared_in_turns_and_nothing_else_is():
    requests = shared_prefix(translation_like(0), at_once(4), prefix_tokens=80, num_prefixes=2)
    heads = [r.token_ids(50_000)[:80] for r in requests]
    tails = [tuple(r.token_ids(50_000)[80:]) for r in requests]
    assert heads[0] == heads[2] != heads[1] == heads[3]
    assert len(set(tails)) == 4
    assert [r.num_prompt - 80 for r in requests] == [p for p, _ in islice(translation_like(0), 4)]


def test_a_turn_of_a_chat_begins_with_all_that_was_said():
    conversations = defaultdict(list)
    for request in chat(alpaca_like(0), at_once(400), seed=0, turns=4):
        conversations[request.stream].append(request)
    assert max(map(len, conversations.values())) == 4
    followed = 0
    for turns in conversations.values():
        for before, after in zip(turns, turns[1:], strict=False):
            if after.offset == 0:
                said = before.token_ids(50_000)
                said += [before.token(len(said) + i, 50_000) for i in range(before.num_output)]
                assert after.token_ids(50_000)[: len(said)] == said
                followed += 1
    assert followed > 100


def test_long_chats_are_cut_at_the_front():
    requests = chat(sharegpt_like(0), at_once(400), seed=0)
    cut = [r for r in requests if r.offset]
    assert cut and all(r.num_prompt == 1024 for r in cut)
    assert all(r.num_prompt <= 1024 and r.num_output <= 1024 for r in requests)
