"""Metrics against numbers computed by hand on small runs."""

import pytest

from minipaged.config import SamplingParams
from minipaged.events.metrics import Metrics, usage
from minipaged.features.speculative.drafts import speculation_of
from tests.fake import fake_engine, next_token


class Clock:
    """A clock that returns the time it is set to."""

    now = 0.0

    def __call__(self):
        return self.now


def watched(**settings):
    engine, clock = fake_engine(**settings), Clock()
    metrics = Metrics(engine.started_event(), clock)
    engine.events.subscribe(metrics)
    return engine, metrics, clock


def params(tokens, n=1):
    return SamplingParams(max_tokens=tokens, ignore_eos=True, n=n)


def test_every_slot_is_accounted_for_after_every_step():
    engine, metrics, _ = watched(num_blocks=14, block_size=4, max_num_seqs=6)
    for i in range(5):
        engine.add_request(f"r{i}", [1] * 9 + [i], params(12, n=1 + i % 3))
    while engine.has_unfinished():
        engine.step()
        now = metrics.usage[-1]
        assert now.tokens + now.empty + now.cached + now.free == 14 * 4
        assert now.empty < 4 * max(1, now.logical_blocks)
        assert now.used_blocks == sum(count > 0 for count in engine.memory.pool.ref_counts)


def test_usage_of_one_known_moment():
    engine, metrics, _ = watched(num_blocks=10, block_size=4)
    engine.add_request("a", [1] * 6, params(5, n=2))
    engine.step()  # six prompt tokens in two blocks, both shared
    now = usage(metrics.state)
    assert (now.tokens, now.empty, now.used_blocks, now.logical_blocks) == (6, 2, 2, 4)
    assert now.sharing == 0.5
    engine.step()  # the partial block was copied, and each branch wrote one token
    now = usage(metrics.state)
    assert (now.tokens, now.empty, now.used_blocks, now.logical_blocks) == (10, 2, 3, 4)


def test_times_are_measured_from_arrival_and_between_tokens():
    engine, metrics, clock = watched()
    engine.add_request("a", [1], params(3))
    for now in (2.0, 5.0, 6.0):
        clock.now = now
        engine.step()
    assert metrics.time_to_first_token == {"a": 2.0}
    assert metrics.inter_token_latency == [3.0, 1.0]
    summary = metrics.summary()
    assert summary["output_tokens"] == 3 and summary["output_tokens_per_second"] == pytest.approx(0.5)


def test_hit_rate_counts_cached_tokens_of_admitted_prompts():
    engine, metrics, _ = watched(block_size=4)
    for name in "ab":
        engine.add_request(name, list(range(10)), params(1))
        engine.step()
    assert metrics.hit_rate == 8 / 20


def test_accepted_guesses_are_counted():
    engine, metrics, _ = watched(speculate="prompt-lookup", num_speculative_tokens=2)
    wrong = lambda tokens: (next_token(tokens, 0) + 1) % 50  # noqa: E731
    speculation_of(engine).propose = lambda seq, count: [next_token(seq.tokens, 0), wrong(seq.tokens)][:count]
    engine.add_request("a", [1, 2, 3], params(7))
    while engine.has_unfinished():
        engine.step()
    # The prefill gives 1 token, then 3 steps give an accepted draft token and the model's own. The third drafts one.
    assert (metrics.proposed_tokens, metrics.accepted_tokens) == (5, 3)
    assert metrics.acceptance_rate == 0.6 and metrics.summary()["speculation_accepted_percent"] == 60


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemptions_are_counted_by_mode(mode):
    engine, metrics, _ = watched(num_blocks=6, block_size=4, preemption=mode, enable_prefix_caching=False)
    for name in "ab":
        engine.add_request(name, [ord(name) % 50] * 8, params(12))
    while engine.has_unfinished():
        engine.step()
    assert metrics.preemptions[mode] > 0 and sum(metrics.preemptions.values()) == metrics.preemptions[mode]
    assert metrics.summary()[f"preemptions_by_{mode}"] == metrics.preemptions[mode]


def test_the_summary_of_an_idle_engine_is_defined():
    _, metrics, _ = watched()
    assert metrics.summary()["output_tokens"] == 0
