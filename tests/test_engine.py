"""The engine's API on the fake model: invalid input, aborts, and steps that fail."""

import math
import warnings

import pytest

from minipaged.config import EngineConfig, SamplingParams
from minipaged.errors import InvalidConfig, InvalidRequest, StepFailed
from minipaged.events import EngineError, State
from tests.fake import EOS, VOCAB, fake_engine, swap_of, unbatched

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def run(engine):
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output
        engine.check()
    return done


BAD_REQUESTS = [
    ({"prompt_token_ids": []}, "prompt is empty"),
    ({"prompt_token_ids": [VOCAB]}, "token id 50"),
    ({"prompt_token_ids": [-1]}, "token id -1"),
    ({"prompt_token_ids": [1.5]}, "token id 1.5"),
    ({"prompt_token_ids": ["a"]}, "token id 'a'"),
    ({"prompt_token_ids": [True]}, "token id True"),
    ({"prompt_token_ids": [1] * 200}, "200 at most"),
    ({"prompt_token_ids": [1] * 128}, "raise num_blocks"),  # 32 blocks of 4: no slot for a next token
    ({"params": SamplingParams(n=9)}, "max_num_seqs = 8"),
    ({"params": SamplingParams(stop="x")}, "need a tokenizer"),
    ({"params": {"n": 1}}, "must be a SamplingParams"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "good"}, "running already"),
]


@pytest.mark.parametrize("change, message", BAD_REQUESTS)
def test_a_bad_request_is_refused_at_the_door_and_the_others_go_on(change, message):
    engine = fake_engine()
    engine.add_request("good", [1, 2, 3], PARAMS)
    engine.step()
    request = {"request_id": "bad", "prompt_token_ids": [1], "params": PARAMS} | change
    with pytest.raises(InvalidRequest, match=message):
        engine.add_request(**request)
    done = run(engine)
    assert done["good"].outputs[0].token_ids == unbatched([1, 2, 3], PARAMS, 0, 200)
    assert "bad" not in done


BAD_SAMPLING = [
    {"n": 0}, {"n": 1.5}, {"n": True},
    {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "hot"},
    {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 2},
    {"max_tokens": 0}, {"max_tokens": 1.0}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": [1]}, {"stop_token_ids": [-1]},
    {"ignore_eos": 1}, {"logprobs": -1}, {"logprobs": 21}, {"seed": -1}, {"seed": "x"},
]  # fmt: skip


@pytest.mark.parametrize("settings", BAD_SAMPLING, ids=str)
def test_sampling_values_that_make_no_sense_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**settings)


BAD_CONFIG = [
    {"model": ""}, {"device": "tpu"}, {"dtype": "int4"}, {"block_size": 0}, {"block_size": 1.5}, {"num_blocks": 0},
    {"max_num_seqs": 0}, {"max_num_batched_tokens": 63}, {"max_model_len": 1}, {"seed": -1},
    {"enable_prefix_caching": "yes"}, {"preemption": "drop"}, {"swap_blocks": 4}, {"eviction_policy": "lru"},
    {"memory": "orca"}, {"memory": None}, {"batching": "dynamic"},
]  # fmt: skip


@pytest.mark.parametrize("settings", BAD_CONFIG, ids=str)
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(InvalidConfig, match=name):
        EngineConfig(**settings)


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_an_abort_in_any_state_gives_every_block_back_and_twice_is_fine(steps):
    engine = fake_engine(max_num_batched_tokens=8)
    engine.add_request("a", [1] * 20, SamplingParams(n=3, max_tokens=30, ignore_eos=True))
    for _ in range(steps):  # waiting, in prefill, in prefill, decoding three sequences
        engine.step()
    output = engine.abort("a")
    assert output.finished and {out.finish_reason for out in output.outputs} == {"abort"}
    engine.check()
    assert engine.memory.pool.num_free == engine.num_blocks and not engine.has_unfinished()
    assert engine.abort("a") is None
    assert engine.abort("never seen") is None


def test_the_id_of_a_finished_request_can_be_used_again():
    engine = fake_engine()
    for _ in range(2):
        engine.add_request("a", [1], PARAMS)
        assert run(engine)["a"].finished


def test_a_request_ends_at_its_end_of_text_token():
    engine = fake_engine(num_blocks=200, max_model_len=400)
    params = SamplingParams(max_tokens=None)
    engine.add_request("a", [1, 2], params)
    (out,) = run(engine)["a"].outputs
    assert out.finish_reason == "stop" and out.token_ids[-1] == EOS
    assert out.token_ids == unbatched([1, 2], params, 0, 400)


def test_stop_token_ids_end_a_request():
    truth = unbatched([1, 2], PARAMS, 0, 200)
    engine = fake_engine()
    engine.add_request("a", [1, 2], SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[truth[4]]))
    (out,) = run(engine)["a"].outputs
    assert out.finish_reason == "stop" and out.token_ids == truth[: truth.index(truth[4]) + 1]


def test_max_model_len_ends_a_request_with_length():
    engine = fake_engine(max_model_len=10)
    engine.add_request("a", [1] * 8, SamplingParams(max_tokens=None, ignore_eos=True))
    (out,) = run(engine)["a"].outputs
    assert out.finish_reason == "length" and len(out.token_ids) == 2


@pytest.mark.parametrize("where", ["runner", "sampler"])
def test_a_failing_step_is_reported_and_the_engine_goes_on(where):
    engine = fake_engine(max_num_seqs=2)
    errors = []
    engine.events.subscribe(lambda e: errors.append(e.message) if isinstance(e, EngineError) else None)
    engine.add_request("a", [1] * 9, PARAMS)
    engine.add_request("b", [1] * 9, PARAMS)
    engine.add_request("c", [2] * 9, PARAMS)  # waiting, so not part of the failing step
    engine.step()
    healthy = engine.runner.execute, engine.sampler

    def broken(*_):
        raise RuntimeError("CUDA out of memory")

    if where == "runner":
        engine.runner.execute = broken
    else:
        engine.sampler = broken
    with pytest.raises(StepFailed, match=r"CUDA out of memory; aborted: a, b") as caught:
        engine.step()
    engine.check()
    assert [out.request_id for out in caught.value.outputs] == ["a", "b"]
    assert all(out.finished for out in caught.value.outputs)
    assert len(errors) == 1 and "CUDA out of memory" in errors[0]
    engine.runner.execute, engine.sampler = healthy
    engine.add_request("a", [1] * 9, PARAMS)
    done = run(engine)
    for name, token in (("a", 1), ("c", 2)):
        assert done[name].outputs[0].token_ids == unbatched([token] * 9, PARAMS, 0, 200)
    assert engine.memory.pool.num_free == engine.num_blocks


def crowded_by_beams():
    """Three beams (4 blocks, and 3 more at the next block boundary) and a short request, in a pool of 6 blocks."""
    engine = fake_engine(num_blocks=6, block_size=4, preemption="swap", enable_prefix_caching=False)
    beams = SamplingParams(temperature=0, beam_width=3, max_tokens=20, ignore_eos=True)
    engine.add_request("beams", [1] * 4, beams)
    engine.add_request("short", [2], SamplingParams(max_tokens=12, ignore_eos=True))
    return engine


def test_a_step_that_only_swaps_out_is_executed_too():
    engine, plans = crowded_by_beams(), []
    execute = engine.runner.execute
    engine.runner.execute = lambda plan: (plans.append(plan), execute(plan))[1]
    done = run(engine)
    # The preempted request's block was not enough, so the search ended and the step had no token to compute.
    assert any(plan.swap_outs and plan.outgrown and not plan.chunks for plan in plans)
    assert done["short"].outputs[0].token_ids == unbatched([2], PARAMS, 0, 200)


def test_an_abort_while_swapped_out_gives_the_swap_space_back():
    engine = crowded_by_beams()
    while not swap_of(engine).requests_out:
        engine.step()
    assert swap_of(engine).space.pool.num_free < swap_of(engine).space.pool.num_blocks
    assert engine.abort("short").finished and engine.abort("short") is None
    engine.check()
    assert swap_of(engine).space.pool.num_free == swap_of(engine).space.pool.num_blocks
    run(engine)


def test_identical_prompts_in_one_step_each_get_their_tokens():
    engine = fake_engine(block_size=4)
    for name in "abc":
        engine.add_request(name, [1, 2] * 5, PARAMS)
    engine.step()
    assert len(engine.block_tables()) == 3  # admitted together, before any has computed a block
    done = run(engine)
    assert all(done[name].outputs[0].token_ids == unbatched([1, 2] * 5, PARAMS, 0, 200) for name in "abc")


def test_a_request_that_a_failing_step_swapped_out_is_aborted_with_it():
    engine = crowded_by_beams()

    def full_disk(plan):
        if plan.swap_outs:
            raise RuntimeError("nothing was copied")
        return type(engine.runner).execute(engine.runner, plan)

    engine.runner.execute = full_disk
    with pytest.raises(StepFailed, match="aborted: beams, short"):
        run(engine)
    engine.check()
    assert not engine.has_unfinished() and swap_of(engine).space.pool.num_free == swap_of(engine).space.pool.num_blocks


def test_what_a_failing_step_would_have_computed_is_never_found():
    engine = fake_engine()

    def broken(plan):
        raise RuntimeError("out of memory")

    engine.runner.execute, execute = broken, engine.runner.execute
    engine.add_request("a", [1] * 9, PARAMS)
    with pytest.raises(StepFailed):
        engine.step()
    engine.runner.execute = execute
    engine.add_request("a", [1] * 9, PARAMS)
    assert run(engine)["a"].outputs[0].token_ids == unbatched([1] * 9, PARAMS, 0, 200)


def test_ctrl_c_inside_a_step_frees_its_requests():
    engine = fake_engine()
    engine.add_request("a", [1] * 9, PARAMS)

    def interrupted(*_):
        raise KeyboardInterrupt

    engine.runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check()
    assert not engine.has_unfinished() and engine.memory.pool.num_free == engine.num_blocks


def test_an_eviction_policy_of_ones_own_decides_what_the_engine_gives_up():
    class Newest(list):
        add = list.append

        def evict(self):
            return self.pop()

    def hits(**settings):
        engine, seen = fake_engine(num_blocks=6, block_size=4, **settings), []
        engine.events.subscribe(lambda e: seen.append(e.num_cached) if e.type == "admitted" else None)
        for prompt in ([1] * 9, [2] * 9, [3] * 9, [1] * 9):
            engine.add_request("a", prompt, SamplingParams(max_tokens=1))
            run(engine)
        return seen

    assert hits() == [0, 0, 0, 4]  # LRU: the tail of the first prompt is evicted
    assert hits(eviction_policy=Newest) == [0, 0, 0, 8]


def test_two_engines_with_different_block_sizes_do_not_affect_one_another():
    engines = [fake_engine(block_size=size) for size in (3, 8)]
    for engine in engines:
        engine.add_request("a", [1, 2, 3, 4], PARAMS)
    outs = [None, None]
    while any(engine.has_unfinished() for engine in engines):
        for i, engine in enumerate(engines):
            for output in engine.step():
                outs[i] = output.outputs[0].token_ids
            engine.check()
    assert outs[0] == outs[1] == unbatched([1, 2, 3, 4], PARAMS, 0, 200)


def test_forks_never_share_an_id_or_their_random_numbers():
    engine = fake_engine()
    state = State()
    state.apply(engine.started_event())
    engine.events.subscribe(state.apply)
    engine.add_request("a{x}", [1] * 5, SamplingParams(max_tokens=30, ignore_eos=True, seed=1))
    for _ in range(3):
        engine.step()
    first = engine.fork("a{x}")
    engine.abort(first)
    second = engine.fork("a{x}")
    assert first != second
    generators = [request.seqs[0].rng.random() for request in engine.scheduler.running]
    assert len(set(generators)) == 2
    engine.abort(second)
    engine.fork("a{x}", "again")
    engine.abort("again")
    engine.fork("a{x}", "again")  # the id of a finished fork may be used again
    assert state.running == ["a{x}", "again"]
    with pytest.raises(InvalidRequest, match="request_id"):
        engine.fork("a{x}", 5)


def test_subscribers_may_watch_but_not_act_in_the_midst_of_a_step():
    engine = fake_engine()
    engine.add_request("a", [1, 2, 3], PARAMS)
    refused = []

    def act(event):
        if event.type == "filled":
            for action in (lambda: engine.abort("a"), engine.step, lambda: engine.add_request("b", [1])):
                with pytest.raises(RuntimeError, match="midst of a change"):
                    action()
                refused.append(action)

    stop = engine.events.subscribe(act)
    engine.step()
    stop()
    assert len(refused) == 3
    assert run(engine)["a"].outputs[0].token_ids == unbatched([1, 2, 3], PARAMS, 0, 200)


@pytest.mark.parametrize("moment", ["request_added", "forked", "freed", "finished"])
def test_subscribers_may_not_act_in_the_midst_of_an_abort_or_a_fork_either(moment):
    """Otherwise a request could end twice, or a fork share blocks that are being freed."""
    engine, refused = fake_engine(), []

    def act(event):
        if event.type == moment:
            for action in (lambda: engine.abort("a"), lambda: engine.fork("a"), engine.step):
                with pytest.raises(RuntimeError, match="midst of a change"):
                    action()
                refused.append(action)

    engine.events.subscribe(act)
    with warnings.catch_warnings(action="error"):  # a subscriber's exception is reported as a warning
        engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
        engine.step()
        engine.fork("a", "b")
        assert engine.abort("a").finished
    assert refused
    engine.check()
    engine.abort("b")
    assert engine.memory.pool.num_free == engine.num_blocks and not engine.has_unfinished()


def test_a_refused_request_changes_nothing_that_comes_later():
    def draws(refuse):
        engine = fake_engine()
        if refuse:
            with pytest.raises(InvalidRequest):
                engine.add_request("bad", [1] * 128, PARAMS)
        engine.add_request("a", [1, 2, 3], PARAMS)
        (seq,) = engine.scheduler.waiting[0].seqs
        return seq.seq_id, seq.rng.random()

    assert draws(True) == draws(False)


TYPES = [{"stop": 5}, {"stop_token_ids": 5}, {"early_stopping": 1, "beam_width": 2}]


@pytest.mark.parametrize("settings", TYPES, ids=str)
def test_types_that_make_no_sense_are_refused_too(settings):
    with pytest.raises(InvalidRequest):
        SamplingParams(temperature=0, **settings)


def test_none_means_no_stop():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert params.stop == params.stop_token_ids == ()


def test_a_subscriber_that_raises_is_left_out_and_told_of_and_the_step_is_whole():
    engine, state = fake_engine(), State()
    state.apply(engine.started_event())
    calls = []

    def broken(event):
        calls.append(event.type)
        if event.type == "allocated":
            raise ValueError("my dashboard is down")

    stop = engine.events.subscribe(broken)
    engine.events.subscribe(state.apply)
    engine.add_request("a", [1, 2, 3], PARAMS)
    with pytest.warns(RuntimeWarning, match="(?s)an event subscriber raised.*broken.*my dashboard is down"):
        (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == 1, "the step's results are lost"
    engine.check()
    assert calls[-1] == "allocated" and calls.count("allocated") == 1
    assert run(engine)["a"].outputs[0].token_ids == unbatched([1, 2, 3], PARAMS, 0, 200)
    assert state.finished == ["a"], "another subscriber missed events"
    stop()


@pytest.mark.parametrize("kind", ["request_added", "forked", "freed"])
def test_a_subscriber_that_raises_between_steps_harms_nobody_either(kind):
    engine = fake_engine()
    act = {
        "request_added": lambda: engine.add_request("b", [1], PARAMS),
        "forked": lambda: engine.fork("a"),
        "freed": lambda: engine.abort("a"),
    }[kind]
    engine.add_request("a", [1, 2, 3], PARAMS)
    for _ in range(2):
        engine.step()

    def broken(event):
        if event.type == kind:
            raise ValueError("oh")

    engine.events.subscribe(broken)
    with pytest.warns(RuntimeWarning, match="an event subscriber raised"):
        act()
    engine.check()
    run(engine)
    assert engine.memory.pool.num_free == engine.num_blocks


def test_what_a_caller_does_to_its_output_does_not_reach_the_engine():
    engine, params = fake_engine(enable_prefix_caching=False), SamplingParams(max_tokens=12, ignore_eos=True)
    engine.add_request("a", [1, 2, 3], params)
    (output,) = engine.step()
    output.prompt_token_ids.clear()
    (output,) = engine.step()
    assert output.prompt_token_ids == [1, 2, 3]
