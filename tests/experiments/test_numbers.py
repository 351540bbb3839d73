"""Results of the experiments against the papers' figures. All of them are deterministic."""

from itertools import islice
from statistics import fmean

import pytest

from minipaged import LLM
from minipaged.experiments import batch_orders, block_size, eviction_policies, latency, saturation, waste_classes
from minipaged.experiments.beam_sharing import saved
from minipaged.experiments.burstiness import served
from minipaged.experiments.parallel_sampling import BlocksSaved
from minipaged.experiments.rates import LIMIT, sustained, sweep
from minipaged.experiments.saturation import saturate, saturated_system
from minipaged.experiments.simulator import Roofline, simulate
from minipaged.features.batchllm.planning import plan
from minipaged.workloads import alpaca_like, at_once, poisson, sharegpt_like, trace

SMALL = Roofline(num_slots=4100)  # a pool that few requests fill
ORCAS = ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)")


def silent(done, text):
    assert 0 <= done <= 1 and text


@pytest.fixture(scope="module")
def pool():
    """The four memory managers with a queue that is never empty."""
    return {system: saturated_system(system, True) for system in (*ORCAS, "paged")}


def test_max_serves_exactly_seven_and_loses_what_is_left_of_the_pool(pool):
    assert pool["Orca (Max)"].mean_batch == 7
    assert pool["Orca (Max)"].percent["external"] == pytest.approx(100 * (1 - 7 * 2048 / 15_728))  # 8.85


def test_batches_are_the_papers(pool):
    assert pool["Orca (Oracle)"].mean_batch == pytest.approx(13.6, abs=1)
    assert pool["Orca (Pow2)"].mean_batch == pytest.approx(10, abs=1)
    assert pool["paged"].mean_batch > 2 * pool["Orca (Oracle)"].mean_batch


def test_paging_fills_the_pool_with_tokens(pool):
    assert pool["paged"].percent["token"] >= 95
    assert pool["paged"].token_of_held >= 95
    assert pool["Orca (Oracle)"].percent["internal"] == 0


def test_classes_sum_to_the_pool(pool):
    for system in pool.values():
        assert sum(system.percent.values()) == pytest.approx(100)
        assert min(system.percent.values()) >= 0


def test_waste_and_its_paper_agree_within_a_few_points():
    result = waste_classes.measure(True, silent)
    for row in result.rows:
        if row.paper:
            assert row.ours == pytest.approx(float(row.paper), abs=8), row.what


def saved_by_hand(lengths, n: int, count: int) -> float:
    """Percentage of blocks saved by sharing among n samples of equal length, summed over each request's steps."""
    logical = saved = 0
    for prompt, output in islice(lengths(0), count):
        for length in range(prompt + 1, prompt + output):
            blocks = -(-length // 16)
            logical += n * blocks
            saved += (n - 1) * (prompt // 16)
        logical += -(-prompt // 16)  # the prefill computes the prompt once for all samples
    return 100 * saved / logical


@pytest.mark.parametrize("n, alpaca", [(2, 6.09), (4, 8.53), (6, 9.79)])
def test_sampling_saves_what_the_paper_says(n, alpaca):
    assert saved_by_hand(alpaca_like, n, 5000) == pytest.approx(alpaca, abs=3)
    assert 14 <= saved_by_hand(sharegpt_like, n, 1500) <= 31


def test_the_engine_shares_just_as_many_blocks():
    for n in (2, 6):
        blocks = BlocksSaved()
        simulate(trace(alpaca_like(0), at_once(40), n=n), watch=blocks)
        assert blocks.percent == pytest.approx(saved_by_hand(alpaca_like, n, 40), abs=0.01)


def test_beams_save_more_than_samples_and_more_the_wider():
    llm = LLM("tiny", num_blocks=512, max_num_seqs=24, enable_prefix_caching=False)
    requests = trace(alpaca_like(0), at_once(4))
    beams = [saved(llm, requests, width, beams=True) for width in (2, 4, 6)]
    samples = [saved(llm, requests, width, beams=False) for width in (2, 4, 6)]
    assert beams[0] < beams[1] < beams[2]
    assert all(b > s for b, s in zip(beams, samples, strict=True))


def test_rates_are_ordered_as_in_the_paper():
    result = latency.measure(True, silent)
    rates = [result.row(f"sustained rate, {system}").ours for system in latency.START]
    assert list(latency.START) == ["FasterTransformer", *ORCAS, "paged"]
    assert rates == sorted(rates) and len(set(rates)) == 5
    assert 1.7 <= result.row("paged / Orca (Oracle)").ours <= 2.7


@pytest.mark.parametrize("tokens", [32, 256, 2048])
def test_page_groups_use_memory_as_blocks_of_their_size_do(tokens):
    requests = trace(sharegpt_like(2), at_once(50))
    settings = {"clock": SMALL, "block_size": tokens}
    runs = [saturate(requests, memory=memory, **settings) for memory in ("vattention", "paged")]
    assert runs[0].percent["token"] == pytest.approx(runs[1].percent["token"], abs=1)
    assert runs[0].mean_batch == pytest.approx(runs[1].mean_batch, rel=0.01)
    if tokens == 2048:
        assert runs[0].mean_batch == 2


def test_larger_blocks_waste_more():
    requests = trace(sharegpt_like(0), at_once(50))
    token = [saturate(requests, clock=SMALL, block_size=size).token_of_held for size in (4, 16, 256)]
    assert token[0] > 99 > token[1] > 95 > token[2]
    assert set(block_size.SIZES) >= {1, 16, 256}


def test_preemptions_rise_with_burstiness():
    means = [fmean(served(cv, 0.7, 200, seed, SMALL).preemptions for seed in range(3)) for cv in (1, 1.41, 3)]
    assert means == sorted(means) and means[-1] > 1.2 * means[0]


def test_right_bits_are_belady_and_wrong_ones_cost_more_the_more_there_are():
    requests = eviction_policies.zipf_with_scans(2000)
    hits = {
        name: eviction_policies.hit_percent(requests, p)
        for name, p in eviction_policies.without_predictions(requests).items()
    }
    assert hits["LRU"] < hits["Belady"] - 10
    bits = eviction_policies.discard_bits(requests, eviction_policies.K)
    for make in eviction_policies.DISCARD.values():
        assert eviction_policies.hit_percent(requests, make(bits)) == hits["Belady"]
    curves = eviction_policies.sweep(requests, silent)
    assert len(curves) == 6
    for rates, values in curves.values():
        assert values[0] > values[3] > values[-1] and rates[0] == 0 and rates[-1] == 1
    few, all_ones = (curves["Mark0, 0s that became 1"][1][index] for index in (1, -1))
    assert few > curves["Mark0, 1s that became 0"][1][1] and all_ones < hits["LRU"]


def test_whoever_knows_last_turns_finds_more_of_a_chat():
    chats = eviction_policies.conversations(60)
    assert 0 < len(chats.last) < len(chats.requests)
    policies = eviction_policies.chat_policies(chats)
    names = ("LRU", "Mark0, last turn known", "Belady")
    found = [eviction_policies.found_percent(chats, policies[name], num_blocks=400) for name in names]
    assert found == sorted(found) and found[2] > 1.2 * found[0]


def test_a_rate_is_found_from_either_side():
    def requests(rate):
        return trace(alpaca_like(0), poisson(rate, 20, seed=0))

    up, down = (sweep(requests, start, clock=SMALL, memory="orca-max") for start in (1.5, 9.0))
    for rates, latencies in (up, down):
        assert rates == sorted(rates) and any(value > LIMIT for value in latencies)
        assert rates[0] < sustained((rates, latencies)) < rates[-1]
    assert sustained(up) == pytest.approx(sustained(down), rel=0.2)


def test_every_system_is_one_that_the_engine_has():
    assert saturation.SYSTEMS["FasterTransformer"]["batching"] == "static"
    assert {settings["memory"] for settings in saturation.SYSTEMS.values()} == {
        "orca-max",
        "orca-pow2",
        "orca-oracle",
        "paged",
    }


def test_groups_serve_a_batch_under_memory_pressure_sooner():
    work = batch_orders.one_level(4, documents=16)
    clock = Roofline(num_slots=2400)
    runs = {name: batch_orders.simulated(system, work, clock) for name, system in batch_orders.SYSTEMS.items()}
    fcfs, ours = runs[batch_orders.BASE], runs[batch_orders.OURS]
    assert fcfs.seconds > 1.3 * ours.seconds and ours.saved > 1.5 * fcfs.saved
    planned = plan([prompt for prompt, _ in work], [count for _, count in work], 16).saved_tokens
    assert ours.saved == planned / sum(len(prompt) for prompt, _ in work)
    assert runs["BatchLLM, no groups"].saved < ours.saved == runs["BatchLLM, no ratio order"].saved


def test_with_nothing_to_share_groups_cost_nothing():
    work = batch_orders.nothing_shared(4, 60)
    clock, systems = Roofline(num_slots=2400), batch_orders.SYSTEMS
    fcfs, ours = (batch_orders.simulated(systems[name], work, clock) for name in (batch_orders.BASE, batch_orders.OURS))
    assert ours.saved == fcfs.saved == 0 and ours.seconds < 1.03 * fcfs.seconds
