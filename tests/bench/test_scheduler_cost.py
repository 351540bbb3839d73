"""The measurement of the scheduler's cost times decode steps only."""

import gc

from minipaged.bench import scheduler_cost as bench


def test_all_sequences_decode_throughout_and_no_block_is_shared():
    engine = bench.decoding(5, 40, steps=6)
    plans = []
    engine.runner.execute = plans.append
    assert bench.microseconds(engine, 6) > 0
    assert [[chunk.num_tokens for chunk in plan.chunks] for plan in plans] == [[1] * 5] * 6
    assert not any(plan.preempted for plan in plans) and max(engine.memory.pool.ref_counts) == 1


def test_memory_is_measured_to_the_end_and_every_request_is_served():
    told = []
    result = bench.memory_growth(100, told.append)
    assert len(result["resident_mib"]) == 10 and told[-1].startswith("100 requests")


def test_a_step_leaves_the_garbage_collector_as_it_was():
    engine = bench.decoding(2, 20, steps=3)
    engine.step()
    assert gc.isenabled()
    gc.disable()
    try:
        engine.step()
        assert not gc.isenabled()
    finally:
        gc.enable()
    engine.runner.execute = lambda plan: 1 / 0
    try:
        engine.step()
    except Exception:
        assert gc.isenabled()


def test_the_profile_names_functions_and_what_they_cost():
    rows = bench.profile(4, 40, steps=2, lines=3)
    assert len(rows) == 3 and all(row["own_us"] >= 0 and ":" in row["function"] for row in rows)
