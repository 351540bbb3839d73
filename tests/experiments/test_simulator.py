"""The simulated clock against times computed by hand, and that it times the real engine's steps."""

import pytest

from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.experiments.simulator import OPT_13B, Roofline, simulate
from minipaged.workloads import TraceRequest, alpaca_like, at_once, chat, poisson, sharegpt_like, trace

KV = 819_200
WEIGHTS = 26e9 / 1.3e12  # seconds to read the weights once


def request(num_prompt=16, num_output=3, arrival=0.0, **fields):
    return TraceRequest(arrival, num_prompt, num_output, **fields)


def decode(context: int) -> float:
    return WEIGHTS + context * KV / 1.3e12


def test_one_request_takes_what_its_steps_take():
    run = simulate([request(num_prompt=16, num_output=3)])
    assert run.seconds == pytest.approx(decode(16) + decode(17) + decode(18))
    assert run.output_tokens == 3 and run.batch == [1, 1, 1]
    (served,) = run.served
    assert served.finished == run.seconds
    assert run.normalized_latency == pytest.approx(run.seconds / 3)


def test_a_long_prompt_is_bound_by_arithmetic_and_cut_into_chunks():
    run = simulate([request(num_prompt=2040, num_output=1)], max_num_batched_tokens=1024)
    assert run.seconds == pytest.approx(2040 * 26e9 / 180e12)
    assert len(run.batch) == 2


def test_a_batch_reads_the_weights_once():
    run = simulate([request(stream=i) for i in range(4)])
    assert run.seconds == pytest.approx(sum(WEIGHTS + 4 * context * KV / 1.3e12 for context in (16, 17, 18)))


def test_the_clock_waits_for_the_next_arrival():
    run = simulate([request(arrival=5.0, stream=1), request(arrival=1.0)])
    alone = decode(16) + decode(17) + decode(18)
    assert [served.finished for served in run.served] == pytest.approx([1 + alone, 5 + alone])


def test_who_comes_during_a_step_waits_for_its_end():
    run = simulate([request(num_output=4), request(num_output=1, arrival=0.001, stream=1)])
    late = next(served for served in run.served if served.request.arrival)
    assert late.finished == pytest.approx(decode(16) + decode(17) + 16 * KV / 1.3e12)


def test_swapping_costs_the_link_and_each_transfer():
    clock = Roofline(link_bandwidth=25e9, transfers_per_block=80, transfer_seconds=1e-5)
    slow = Roofline(link_bandwidth=25e9, transfers_per_block=80, transfer_seconds=1e-3)
    requests = trace(alpaca_like(0), at_once(30))
    settings = {"num_blocks": 40, "preemption": "swap", "max_num_seqs": 16}
    first, second = (simulate(requests, c, **settings) for c in (clock, slow))
    assert first.preemptions == second.preemptions > 0
    assert second.seconds - first.seconds > first.preemptions * 2 * 80 * 9e-4  # at least one block, out and in
    recomputed = simulate(requests, clock, num_blocks=40, max_num_seqs=16)
    assert recomputed.preemptions > 0
    assert recomputed.output_tokens == first.output_tokens == sum(r.num_output for r in requests)


@pytest.mark.parametrize("memory", ["paged", "orca-max", "orca-pow2", "orca-oracle", "vattention"])
@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_every_manager_serves_all_of_it_and_does_so_again(memory, batching):
    requests = trace(alpaca_like(1), poisson(20.0, 2.0, seed=0), n=2)
    settings = {"memory": memory, "batching": batching, "num_blocks": 300}
    run, again = (simulate(requests, **settings) for _ in range(2))
    assert len(run.served) == len(requests)
    assert run.output_tokens == 2 * sum(r.num_output for r in requests)
    assert (run.seconds, run.batch, run.served) == (again.seconds, again.batch, again.served)


def test_a_saturated_run_ends_with_the_queue():
    requests = trace(sharegpt_like(0), at_once(60))
    run = simulate(requests, saturated=True, memory="orca-max")
    assert set(run.batch[1:]) == {7} and len(run.served) == 60 - 7
    warm = simulate(requests, saturated=True, warm_up=20, memory="orca-max")
    assert warm.seconds == run.seconds and len(warm.batch) < len(run.batch)


def test_the_watch_sees_each_step_with_its_memory_reserved():
    seen = []

    def watch(engine, plan):
        (chunk,) = plan.chunks
        seen.append((chunk.start + chunk.num_tokens, len(chunk.block_table), len(engine.scheduler.running)))

    simulate([request(num_prompt=15, num_output=3)], watch=watch)
    assert seen == [(15, 1, 1), (16, 1, 1), (17, 2, 1)]


def test_what_failed_in_the_trace_is_not_served():
    assert len(simulate([request(), request(stream=1, num_output=0, failed=True)]).served) == 1


def test_the_next_turn_of_a_chat_finds_the_last_one_in_the_prefix_cache():
    requests = chat(alpaca_like(0), poisson(2.0, 60.0, seed=0), seed=0, turns=8)
    fresh, kept = (simulate(requests, enable_prefix_caching=cache) for cache in (False, True))
    assert kept.output_tokens == fresh.output_tokens
    computed = {}
    for cache in (False, True):
        counts = []
        simulate(requests, enable_prefix_caching=cache, watch=lambda _, plan, c=counts: c.append(plan.num_tokens))
        computed[cache] = sum(counts)
    assert computed[True] < 0.6 * computed[False]


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(InvalidRequest, match="speculate on a real model"):
        simulate([], speculate="prompt-lookup")
    with pytest.raises(InvalidRequest, match="real model"):
        simulate([request(beam_width=2)])
    with pytest.raises(InvalidRequest):
        simulate([request(num_prompt=5000)])
    with pytest.raises(InvalidConfig):
        simulate([request()], memory="orca")


def test_the_clock_says_what_it_assumes():
    for number in ("26 GB", "800 KB", "1.3 TB/s", "180 TFLOP/s", "15,728"):
        assert number in OPT_13B.stated()
