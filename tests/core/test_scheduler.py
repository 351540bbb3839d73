"""The scheduler's rules, one at a time. The fuzz test covers their combinations."""

import pytest

from minipaged.config import SamplingParams
from minipaged.core.plan import SampledToken, StepPlan
from minipaged.events import Preempted
from tests.fake import VOCAB, fake_engine, swap_of, unbatched, unbatched_beams

LONG = SamplingParams(max_tokens=60, ignore_eos=True)


def counts(plan):
    return {chunk.request.request_id: chunk.num_tokens for chunk in plan.chunks}


def plans(engine):
    """Records every plan that the engine executes."""
    seen, execute = [], engine.runner.execute

    def recording(plan):
        seen.append(plan)
        return execute(plan)

    engine.runner.execute = recording
    return seen


def run(engine):
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.check()
    return done


def test_running_sequences_get_their_token_in_every_step_while_prompts_keep_arriving():
    engine = fake_engine(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=10)
    seen = plans(engine)
    engine.add_request("first", [1, 2, 3], LONG)
    engine.step()
    for i in range(30):
        engine.add_request(f"later-{i}", [3] * 40, SamplingParams(max_tokens=1))
        engine.step()
    assert all(counts(plan).get("first") == 1 for plan in seen[1:])
    assert all(plan.num_tokens <= 10 for plan in seen)
    assert any(count > 1 for plan in seen[1:] for count in counts(plan).values())  # prefills got the rest of the budget


def test_decodes_come_first_in_the_plan():
    engine = fake_engine(num_blocks=200, max_num_batched_tokens=10)
    seen = plans(engine)
    engine.add_request("short", [1], LONG)
    engine.step()
    engine.add_request("long", [5] * 30, LONG)
    for _ in range(4):
        engine.step()
    mixed = [plan for plan in seen if {1, 9} <= set(counts(plan).values())]
    assert mixed and all(plan.chunks[0].num_tokens == 1 for plan in mixed)


def test_requests_are_admitted_in_order_of_arrival_even_if_a_later_one_would_fit():
    engine = fake_engine(num_blocks=10, block_size=4, enable_prefix_caching=False)
    engine.add_request("a", [1] * 24, LONG)
    engine.add_request("b", [2] * 24, LONG)
    engine.add_request("c", [3], LONG)
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == ["a"]
    assert [r.request_id for r in engine.scheduler.waiting] == ["b", "c"]


def test_never_more_sequences_than_max_num_seqs():
    engine = fake_engine(num_blocks=100, max_num_seqs=3)
    for i in range(4):
        engine.add_request(f"r{i}", [i + 1], SamplingParams(n=2, max_tokens=5))
    engine.step()
    assert len(engine.scheduler.running) == 1  # a second pair would make four
    run(engine)


def test_the_latest_arrival_is_preempted_and_its_tokens_do_not_change():
    engine = fake_engine(num_blocks=12, block_size=4, enable_prefix_caching=False)
    preempted = []
    engine.events.subscribe(lambda e: preempted.append(e.request_id) if isinstance(e, Preempted) else None)
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    for name in "ab":
        engine.add_request(name, [ord(name) % 50] * 5, params)
    done = run(engine)
    assert preempted and set(preempted) == {"b"}
    for name in "ab":
        assert done[name].outputs[0].token_ids == unbatched([ord(name) % 50] * 5, params, 0, 200)


def test_a_preempted_request_leaves_the_plan_and_its_tokens_are_not_counted():
    engine = fake_engine(num_blocks=6, block_size=4, enable_prefix_caching=False)
    engine.add_request("a", [1] * 8, LONG)
    engine.add_request("b", [2] * 8, LONG)
    seen = plans(engine)
    while not (seen and seen[-1].preempted):
        engine.step()
    plan = seen[-1]
    assert [r.request_id for r in plan.preempted] == ["b"] and counts(plan) == {"a": 1} and plan.num_tokens == 1
    assert engine.scheduler.waiting[0].request_id == "b"


def test_nobody_is_admitted_in_a_step_that_preempts():
    engine = fake_engine(num_blocks=6, block_size=4, enable_prefix_caching=False)
    seen = plans(engine)
    engine.add_request("a", [1] * 8, LONG)
    engine.add_request("b", [2] * 8, LONG)
    engine.step()
    engine.add_request("c", [3], LONG)
    run(engine)
    preempting = [plan for plan in seen if plan.preempted]
    assert preempting and all(chunk.start > 0 for plan in preempting for chunk in plan.chunks)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_victim_comes_back_only_when_the_others_have_a_block_each_to_grow_into(mode):
    engine = fake_engine(num_blocks=12, block_size=4, preemption=mode, enable_prefix_caching=False)
    scheduler, back = engine.scheduler, []

    def listen(event):  # runs just before the request takes its blocks
        if event.type in ("resumed", "admitted") and scheduler.step > 5:
            (request,) = [r for r in scheduler.running if r.request_id == event.request_id]
            left = engine.memory.pool.num_free - engine.memory.blocks_to_hold(scheduler.demand(request))
            back.append((left, len(scheduler.running) - 1))

    engine.events.subscribe(listen)
    for name in "abc":
        engine.add_request(name, [ord(name) % 50] * 8, SamplingParams(max_tokens=24, ignore_eos=True))
    run(engine)
    assert back and all(left >= others for left, others in back)


def test_a_preempted_group_comes_back_with_all_its_branches_sharing_what_still_agrees():
    engine = fake_engine(num_blocks=14, block_size=4, max_num_seqs=4, enable_prefix_caching=False)
    params = SamplingParams(n=3, max_tokens=12, ignore_eos=True)
    engine.add_request("a", [1] * 9, params)
    engine.add_request("b", [2] * 9, SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(4):
        engine.step()
    request, later = engine.scheduler.running
    for victim in (later, request):
        engine.scheduler.preempt(victim, StepPlan(0))
    assert not engine.memory.tables
    done = {}
    shared_again = False
    while engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output
        tables = [engine.memory.tables.get(seq.seq_id, []) for seq in request.seqs]
        shared_again |= all(table[:2] == tables[0][:2] and len(table) > 2 for table in tables)
        engine.check()
    assert shared_again
    for out in done["a"].outputs:
        assert out.token_ids == unbatched([1] * 9, params, out.index, 200)


def test_beams_that_are_computed_again_in_chunks_wait_for_one_another():
    params = SamplingParams(temperature=0, beam_width=3, n=3, max_tokens=14, ignore_eos=True)
    in_parts = False
    for token in range(8):
        engine = fake_engine(max_num_seqs=4, max_num_batched_tokens=7, enable_prefix_caching=False)
        engine.add_request("a", [token] * 5, params)
        for _ in range(10):
            engine.step()
        (request,) = engine.scheduler.running
        engine.scheduler.preempt(request, StepPlan(0))
        seen = plans(engine)
        found = [out.token_ids for out in run(engine)["a"].outputs]
        assert found == unbatched_beams([token] * 5, params, 200)
        assert all(len(plan.samples) in (0, 3) for plan in seen)  # beams compete, so all of them sample or none
        in_parts |= any(0 < len(plan.chunks) < 3 for plan in seen[2:])
    assert in_parts


def test_a_lone_sequence_that_outgrows_the_pool_ends_with_length():
    engine = fake_engine(num_blocks=3, block_size=4)
    engine.add_request("a", [1] * 5, LONG)
    (out,) = run(engine)["a"].outputs
    assert out.finish_reason == "length" and 5 + len(out.token_ids) == 13  # 12 slots, and one token without KV
    assert engine.memory.pool.num_free == 3


def test_of_branches_that_outgrow_the_pool_the_last_gives_way_to_the_others():
    engine = fake_engine(num_blocks=4, block_size=4)
    params = SamplingParams(n=2, max_tokens=10, ignore_eos=True)
    engine.add_request("a", [1] * 4, params)
    first, second = run(engine)["a"].outputs
    assert len(second.token_ids) < len(first.token_ids) == 10
    assert first.finish_reason == second.finish_reason == "length"


def test_a_long_prompt_is_computed_in_chunks_under_the_budget():
    engine = fake_engine(num_blocks=50, max_num_batched_tokens=16, max_num_seqs=4)
    seen = plans(engine)
    engine.add_request("a", list(range(40)), SamplingParams(max_tokens=1))
    run(engine)
    assert [plan.num_tokens for plan in seen] == [16, 16, 8]
    assert [len(plan.samples) for plan in seen] == [0, 0, 1]


def test_a_second_identical_prompt_computes_only_what_is_not_cached():
    engine = fake_engine(num_blocks=50, block_size=4)
    seen = plans(engine)
    prompt = list(range(16))
    engine.add_request("a", prompt, SamplingParams(max_tokens=1))
    run(engine)
    engine.add_request("b", prompt, SamplingParams(max_tokens=1))
    done = run(engine)
    assert [plan.num_tokens for plan in seen] == [16, 4]  # a full hit recomputes its last block
    assert done["b"].outputs[0].token_ids == unbatched(prompt, SamplingParams(max_tokens=1), 0, 200)


@pytest.mark.parametrize("branches", [2, 3])
def test_n_samples_compute_the_prompt_once(branches):
    engine = fake_engine(num_blocks=50, block_size=4, enable_prefix_caching=False)
    seen = plans(engine)
    engine.add_request("a", [1] * 10, SamplingParams(n=branches, max_tokens=3, ignore_eos=True))
    run(engine)
    assert [plan.num_tokens for plan in seen] == [10, branches, branches]
    assert [len(plan.copies) for plan in seen] == [0, branches - 1, 0]  # the last owner writes in place


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_takes_only_references_from_blocks_that_others_share(preemption):
    engine = fake_engine(block_size=4, preemption=preemption)
    prompt, params = [1] * 9, SamplingParams(max_tokens=10, ignore_eos=True)
    engine.add_request("a", prompt, params)
    engine.step()
    engine.add_request("b", prompt, params)
    engine.step()
    first, second = (engine.block_tables()[r.seqs[0].seq_id] for r in engine.scheduler.running)
    counts = engine.memory.pool.ref_counts
    assert first[:2] == second[:2] and counts[first[0]] == 2
    plan = StepPlan(0)
    engine.scheduler.preempt(engine.scheduler.running[-1], plan)
    engine.runner.execute(plan)
    assert counts[first[0]] == counts[first[1]] == 1
    done = run(engine)
    assert done["a"].outputs[0].token_ids == done["b"].outputs[0].token_ids == unbatched(prompt, params, 0, 200)


@pytest.mark.parametrize("spare", [0, 1])
def test_nobody_is_admitted_without_a_block_for_the_next_token(spare):
    engine = fake_engine(num_blocks=4 + spare, block_size=4, enable_prefix_caching=False)
    engine.add_request("a", [1] * 5, LONG)
    engine.add_request("b", [2] * 8, LONG)  # fills two blocks exactly and would be preempted one step later
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == ["a", "b"][: 1 + spare]


@pytest.mark.parametrize("spare", [0, 1])
def test_blocks_that_branches_are_about_to_take_are_not_given_to_others(spare):
    engine = fake_engine(num_blocks=5 + spare, block_size=4, enable_prefix_caching=False)
    seen = plans(engine)
    engine.add_request("a", [1] * 4, SamplingParams(n=3, max_tokens=4, ignore_eos=True))  # 1 block, soon 1 + 3
    engine.add_request("b", [2] * 4, LONG)
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == ["a", "b"][: 1 + spare]
    engine.step()
    assert not seen[-1].preempted


def test_cached_blocks_that_nobody_uses_are_not_counted_twice_at_admission():
    engine = fake_engine(num_blocks=4, block_size=4)
    engine.add_request("a", [1] * 8, SamplingParams(max_tokens=1))
    run(engine)
    assert engine.memory.pool.num_free == 4  # two of them cached: a hit makes them unavailable
    engine.add_request("b", [2] * 7, LONG)
    engine.add_request("c", [1] * 8, LONG)  # hits one block, which must come out of the two that b leaves
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == ["b"]
    run(engine)


def test_nobody_is_admitted_while_a_swapped_request_waits():
    engine = fake_engine(num_blocks=6, block_size=4, preemption="swap", enable_prefix_caching=False)
    engine.add_request("a", [1] * 8, SamplingParams(max_tokens=10, ignore_eos=True))
    engine.add_request("b", [2] * 8, SamplingParams(max_tokens=10, ignore_eos=True))
    while not swap_of(engine).requests_out:
        engine.step()
    engine.add_request("c", [3], SamplingParams(max_tokens=1))
    engine.step()
    assert engine.memory.pool.num_free == 2  # c would fit, b does not
    assert [r.request_id for r in swap_of(engine).requests_out] == ["b"]
    assert [r.request_id for r in engine.scheduler.waiting] == ["c"]
    run(engine)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_draws_depend_on_neither_preemption_nor_neighbours_and_branches_differ(preemption):
    def tokens(num_blocks, names):
        engine = fake_engine(num_blocks=num_blocks, block_size=4, preemption=preemption)
        engine.sampler = lambda _, plan: [SampledToken(seq.rng.randrange(VOCAB)) for _, seq in plan.samples]
        seen = plans(engine)
        for name in names:
            seed = ord(name)
            engine.add_request(name, [seed % 50] * 9, SamplingParams(n=2, seed=seed, max_tokens=14, ignore_eos=True))
        done = run(engine)
        return {name: [out.token_ids for out in done[name].outputs] for name in names}, seen

    roomy, _ = tokens(100, "abc")
    tight, seen = tokens(20, "abc")
    assert any(plan.preempted for plan in seen) and tight == roomy
    assert all(tokens(100, name)[0][name] == roomy[name] for name in "abc")
    assert all(first != second for first, second in roomy.values())


@pytest.mark.parametrize("memory", ["paged", "orca-max"])
def test_a_static_batch_ends_with_its_longest_request_before_anybody_joins(memory):
    engine = fake_engine(num_blocks=100, max_model_len=64, max_num_seqs=3, memory=memory, batching="static")
    batches = []

    def watch(event):
        if event.type == "admitted":
            batches.append((engine.scheduler.step, event.request_id))

    engine.events.subscribe(watch)
    for name, length in zip("abcd", (2, 9, 4, 3), strict=True):
        engine.add_request(name, [1] * 5, SamplingParams(max_tokens=length, ignore_eos=True))
    done = run(engine)
    assert batches == [(0, "a"), (0, "b"), (0, "c"), (9, "d")], "b runs for nine steps"
    for name, length in zip("abcd", (2, 9, 4, 3), strict=True):
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        assert done[name].outputs[0].token_ids == unbatched([1] * 5, params, 0, 64)


def test_a_static_batch_is_as_large_as_memory_allows_whatever_the_token_budget():
    engine = fake_engine(
        num_blocks=100, block_size=4, max_model_len=64, memory="orca-max", batching="static", max_num_batched_tokens=10
    )
    seen = plans(engine)
    for i in range(8):
        engine.add_request(f"r{i}", [i] * 20, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == [f"r{i}" for i in range(6)]  # 6 · 16 of 100 blocks
    done = run(engine)
    assert all(plan.num_tokens <= 10 for plan in seen)
    for i in range(8):
        truth = unbatched([i] * 20, SamplingParams(max_tokens=3, ignore_eos=True), 0, 64)
        assert done[f"r{i}"].outputs[0].token_ids == truth


def test_a_victim_without_blocks_is_recomputed_where_there_is_no_swap_space():
    """A static batch also admits requests for which the step has no tokens left, so they hold no block yet."""
    engine = fake_engine(num_blocks=5, block_size=4, max_num_seqs=2, max_num_batched_tokens=6, batching="static")
    modes = []
    engine.events.subscribe(lambda event: modes.append(event.mode) if event.type == "preempted" else None)
    for name in "ab":
        engine.add_request(name, [ord(name) % 50] * 7, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    (victim,) = [request for request in engine.scheduler.running if not engine.memory.tables[request.seqs[0].seq_id]]
    engine.scheduler.preempt(victim, StepPlan(1))
    assert modes == ["recompute"] and victim in engine.scheduler.waiting
