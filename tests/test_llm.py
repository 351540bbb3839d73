"""The `LLM` class on a small, random Llama: its tokens are those of transformers, for any batch and memory manager."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import SimpleNamespace

import psutil
import pytest
import torch

from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.config import MANAGERS
from minipaged.errors import InvalidConfig, InvalidRequest, MinipagedError, StepFailed
from minipaged.events import Admitted, Copied, Preempted, Shared, StepFinished
from minipaged.execution.pool_size import blocks_that_fit
from tests.aio import run
from tests.checkpoints import VOCAB, save_llama, transformers_greedy
from tests.fake import swap_of

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts():
    random = Random(0)
    return [[random.randrange(3, VOCAB) for _ in range(length)] for length in (1, 5, 15, 16, 17, 40)]


@pytest.fixture(scope="module")
def truth(checkpoint, prompts):
    """Tokens that transformers generates greedily, one prompt at a time, past end-of-text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outs = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        outs.append(ids[0, len(prompt) :].tolist())
    return outs


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def small(checkpoint, **settings):
    return LLM(str(checkpoint), **({"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64} | settings))


@pytest.mark.parametrize("block_size", [1, 3, 16, 24])
@pytest.mark.parametrize("caching", [True, False])
def test_greedy_tokens_equal_transformers(checkpoint, prompts, truth, block_size, caching):
    llm = small(checkpoint, block_size=block_size, num_blocks=512 // block_size, enable_prefix_caching=caching)
    assert tokens(llm.generate(prompts, GREEDY)) == truth
    assert tokens(llm.generate(prompts, GREEDY)) == truth  # now with prefix cache hits, if it is enabled
    assert llm.engine.memory.pool.num_free == llm.engine.num_blocks


def test_a_batch_in_groups_has_the_same_tokens_in_the_order_of_the_prompts(checkpoint, prompts, truth):
    llm = small(checkpoint, block_size=4, num_blocks=40, max_num_seqs=2)
    cached = []
    llm.engine.events.subscribe(lambda e: cached.append(e.num_cached) if isinstance(e, Admitted) else None)
    again = [prompt[:12] + prompt[:12] for prompt in prompts]
    batch = [*prompts, *prompts, *again]
    grouped, plain = (tokens(llm.generate(batch, GREEDY, schedule=schedule)) for schedule in ("batchllm", "fcfs"))
    assert grouped[:6] == grouped[6:12] == truth and grouped == plain
    assert cached[:18].count(0) < 12
    sampled = [
        [out.token_ids for out in output.outputs]
        for schedule in ("batchllm", "fcfs")
        for output in small(checkpoint, block_size=4).generate(
            prompts * 2, SamplingParams(n=2, max_tokens=5, ignore_eos=True), schedule=schedule
        )
    ]
    assert sampled[:12] == sampled[12:]  # also without a seed
    with pytest.raises(InvalidRequest, match="schedule must be one of fcfs, batchllm"):
        llm.generate(prompts, schedule="lifo")
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate([*prompts, ""], schedule="batchllm")
    with pytest.raises(InvalidConfig, match="enable_prefix_caching"):
        small(checkpoint, enable_prefix_caching=False).generate(prompts, schedule="batchllm")
    assert not llm.engine.has_unfinished() and llm.generate([], schedule="batchllm") == []


def test_tokens_survive_preemption_and_chunked_prefill(checkpoint, prompts, truth):
    llm = small(checkpoint, block_size=4, num_blocks=18, max_num_batched_tokens=9)
    preempted = []
    llm.engine.events.subscribe(lambda e: preempted.append(e) if isinstance(e, Preempted) else None)
    assert tokens(llm.generate(prompts, GREEDY)) == truth
    assert preempted


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("memory", MANAGERS)
def test_tokens_are_the_same_under_every_memory_manager(checkpoint, prompts, truth, memory, batching):
    block_size = None if memory == "vattention" else 4  # blocks must fill whole pages
    llm = small(checkpoint, memory=memory, batching=batching, block_size=block_size, max_model_len=64)
    assert tokens(llm.generate(prompts, GREEDY)) == truth
    assert llm.engine.memory.pool.num_free == 64
    params = [
        SamplingParams(n=3, seed=5, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0, beam_width=3, n=3, max_tokens=9),
    ]
    found, expected = (
        [[out.token_ids for out in output.outputs] for output in some.generate([prompts[1]] * 2, params)]
        for some in (llm, small(checkpoint, block_size=4, max_model_len=64))
    )
    assert found == expected


def test_n_samples_share_the_prompt_and_each_equals_a_lone_run_of_its_branch(checkpoint, prompts):
    llm = small(checkpoint, block_size=4, enable_prefix_caching=False)
    seen = []
    llm.engine.events.subscribe(seen.append)
    params = SamplingParams(n=3, seed=5, max_tokens=15, ignore_eos=True)
    (output,) = llm.generate([prompts[1]], params)
    assert len({tuple(out.token_ids) for out in output.outputs}) == 3
    assert any(isinstance(e, Copied) for e in seen) and any(isinstance(e, Shared) for e in seen)
    crowd = llm.generate([prompts[1], *prompts], [params, *[SamplingParams(max_tokens=15)] * len(prompts)])
    assert [o.token_ids for o in crowd[0].outputs] == [o.token_ids for o in output.outputs]


def test_seeded_results_repeat_and_do_not_depend_on_batch_or_preemption(checkpoint, prompts):
    params = SamplingParams(seed=11, max_tokens=20, temperature=0.9, top_p=0.95, ignore_eos=True)
    alone = [tokens(small(checkpoint).generate([p], params))[0] for p in prompts]
    assert tokens(small(checkpoint).generate(prompts, params)) == alone
    assert tokens(small(checkpoint, block_size=4, num_blocks=18).generate(prompts, params)) == alone


def test_the_engine_seed_makes_unseeded_requests_repeat(checkpoint, prompts):
    params = SamplingParams(max_tokens=10)
    first, second, other = (tokens(small(checkpoint, seed=s).generate(prompts, params)) for s in (1, 1, 2))
    assert first == second != other


def test_end_of_text_ends_as_in_transformers(tmp_path, prompts):
    # The fourth token of greedy decoding becomes an end-of-text token.
    path = save_llama(tmp_path / "a")
    fourth = transformers_greedy(path, prompts[2], 4)[3]
    path = save_llama(tmp_path / "b", eos_token_id=[2, fourth])
    (out,) = small(path).generate([prompts[2]], SamplingParams(temperature=0, max_tokens=30))[0].outputs
    assert out.finish_reason == "stop"
    assert out.token_ids == transformers_greedy(path, prompts[2], 30)


def test_logprobs_equal_transformers(checkpoint, prompts):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    params = SamplingParams(seed=1, max_tokens=6, logprobs=4, ignore_eos=True)
    (out,) = small(checkpoint).generate([prompts[3]], params)[0].outputs
    with torch.inference_mode():
        logits = model(torch.tensor([prompts[3] + out.token_ids])).logits[0, len(prompts[3]) - 1 : -1]
    expected = logits.log_softmax(-1)
    total = 0.0
    for position, (token, reported) in enumerate(zip(out.token_ids, out.logprobs, strict=True)):
        assert reported.keys() == set(expected[position].topk(4).indices.tolist()) | {token}
        for candidate, logprob in reported.items():
            assert logprob == pytest.approx(expected[position, candidate].item(), abs=1e-3)
        total += reported[token]
    assert out.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("budget", [64, 9])
def test_prompt_logprobs_equal_transformers_also_in_chunks_and_after_a_cached_prompt(checkpoint, prompts, budget):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    llm = small(checkpoint, block_size=4, max_num_batched_tokens=budget)
    llm.generate(prompts, GREEDY)  # fills the prefix cache
    for prompt in prompts:
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=3, n=2, prompt_logprobs=2))
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert len(output.prompt_logprobs) == len(prompt) and output.prompt_logprobs[0] is None
        for position, reported in enumerate(output.prompt_logprobs[1:]):
            token = prompt[position + 1]
            assert reported.keys() == set(expected[position].topk(2).indices.tolist()) | {token}
            assert reported[token] == pytest.approx(expected[position, token].item(), abs=1e-3)


def test_min_tokens_and_penalties_work_through_the_front_door(checkpoint, prompts):
    llm = small(checkpoint)
    plain = llm.generate([prompts[1]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    favourite = plain.token_ids[0]
    stopping = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[favourite])
    assert llm.generate([prompts[1]], stopping)[0].outputs[0].token_ids == [favourite]
    later = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[favourite], min_tokens=5)
    assert favourite not in llm.generate([prompts[1]], later)[0].outputs[0].token_ids[:5]
    biased = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={17: 1000.0})
    assert llm.generate([prompts[1]], biased)[0].outputs[0].token_ids == [17] * 4
    varied = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, frequency_penalty=100.0)
    assert len(set(llm.generate([prompts[1]], varied)[0].outputs[0].token_ids)) == 12


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_tokens_survive_both_kinds_of_preemption(checkpoint, prompts, truth, preemption):
    room = {"swap_blocks": 60} if preemption == "swap" else {}
    llm = small(checkpoint, block_size=4, num_blocks=18, preemption=preemption, **room)
    modes = set()
    llm.engine.events.subscribe(lambda e: modes.add(e.mode) if isinstance(e, Preempted) else None)
    assert tokens(llm.generate(prompts, GREEDY)) == truth
    assert modes == {preemption}


def test_a_running_request_can_be_forked_by_hand(checkpoint, prompts, truth):
    llm = small(checkpoint, block_size=4)
    engine = llm.engine
    engine.add_request("a", prompts[2], GREEDY)
    with pytest.raises(InvalidRequest, match="not a running request"):
        engine.fork("a")
    for _ in range(5):
        engine.step()
    child = engine.fork("a")
    tables = list(engine.block_tables().values())
    assert tables[0] == tables[1]
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output.outputs[0].token_ids
        engine.check()
    assert done == {"a": truth[2], child: truth[2]}  # greedy: both generate the same tokens, in separate blocks
    with pytest.raises(InvalidRequest):
        engine.fork("a")


def test_a_fork_draws_its_own_numbers(checkpoint, prompts):
    llm = small(checkpoint)
    params = SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
    llm.engine.add_request("a", prompts[2], params)
    for _ in range(5):
        llm.engine.step()
    llm.engine.fork("a", "b")
    done = {}
    while llm.engine.has_unfinished():
        done |= {output.request_id: output.outputs[0].token_ids for output in llm.engine.step()}
    assert done["a"][:5] == done["b"][:5] and done["a"] != done["b"]
    assert done["a"] == tokens(small(checkpoint).generate([prompts[2]], params))[0]


def test_prompts_and_params_in_every_form(checkpoint):
    llm = small(checkpoint)
    assert llm.generate([], GREEDY) == []
    one = llm.generate([5, 6, 7], GREEDY)
    assert len(one) == 1 and one[0].prompt_token_ids == [5, 6, 7] and one[0].finished
    two = llm.generate([[5, 6, 7], [8]], [GREEDY, SamplingParams(max_tokens=3, ignore_eos=True)])
    assert two[0].outputs[0].token_ids == one[0].outputs[0].token_ids and len(two[1].outputs[0].token_ids) == 3


def test_bad_input_is_refused_and_leaves_nothing_behind(checkpoint):
    llm = small(checkpoint)
    for prompts, params in [
        ("text without a tokenizer", GREEDY),
        ("", GREEDY),
        ([[1], []], GREEDY),
        ([[1], [VOCAB]], GREEDY),
        ([[1], 2.0], GREEDY),
        ([[1], [2]], [GREEDY]),
    ]:
        with pytest.raises(InvalidRequest):
            llm.generate(prompts, params)
        assert not llm.engine.has_unfinished() and not llm._inboxes
    with pytest.raises(InvalidRequest, match="chat template|tokenizer"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_settings_that_do_not_fit_the_model_are_refused(checkpoint):
    with pytest.raises(InvalidConfig, match="max_model_len"):
        small(checkpoint, max_model_len=10_000)
    with pytest.raises(InvalidConfig, match="GB free"):
        small(checkpoint, num_blocks=10**12)
    with pytest.raises(InvalidConfig, match="swap_bytes"):
        LLM(str(checkpoint), swap_bytes=1)


@pytest.mark.parametrize(
    "swap_blocks, device, pool", [(0, "cpu", 50), (30, "cpu", 20), (None, "cpu", 25), (None, "cuda", 90)]
)
def test_a_swap_space_counts_where_it_takes_memory_from_the_pool(monkeypatch, swap_blocks, device, pool):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))

    def fit(wanted=None):
        return blocks_that_fit(10, torch.device(device), wanted=wanted, useful=99, swap_blocks=swap_blocks)

    assert fit() == pool  # half of 100 on a CPU, 90 % on a GPU
    most = {"cuda": 100, "cpu": 100 // 2 if swap_blocks is None else 100 - swap_blocks}[device]
    assert fit(most) == most
    with pytest.raises(InvalidConfig, match=f"{most} blocks at most"):
        fit(most + 1)


def test_a_swap_space_that_leaves_nothing_for_the_pool_is_refused(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InvalidConfig, match="not even one"):
        blocks_that_fit(10, torch.device("cpu"), wanted=None, useful=99, swap_blocks=50)


def test_an_llm_counts_its_swap_space(checkpoint, monkeypatch):
    plenty = small(checkpoint, num_blocks=None, preemption="swap").engine
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * plenty.bytes_per_block))
    engine = small(checkpoint, num_blocks=None, preemption="swap").engine
    assert engine.num_blocks == swap_of(engine).space.pool.num_blocks == 10
    assert small(checkpoint, num_blocks=None, preemption="swap", swap_blocks=5).engine.num_blocks == 15
    assert small(checkpoint, num_blocks=None).engine.num_blocks == 20


def test_num_blocks_is_chosen_when_not_given(checkpoint):
    llm = LLM(str(checkpoint), max_num_seqs=4)
    assert llm.engine.num_blocks == 4 * -(-256 // EngineConfig().block_size)  # four sequences of maximum length


def test_a_stream_yields_every_token_once_and_closing_it_frees_its_blocks(checkpoint, prompts, truth):
    llm = small(checkpoint)
    deltas = list(llm.stream(prompts[4], GREEDY))
    assert [t for delta in deltas for t in delta.token_ids] == truth[4]
    assert [delta.finish_reason for delta in deltas] == [None] * 19 + ["length"]
    stream = llm.stream(prompts[4], GREEDY)
    next(stream)
    assert llm.engine.has_unfinished()
    stream.close()
    assert not llm.engine.has_unfinished() and llm.engine.memory.pool.num_free == llm.engine.num_blocks


def test_a_stream_that_nobody_reads_frees_its_blocks_when_dropped(checkpoint):
    llm = small(checkpoint)
    stream = llm.stream([1, 2, 3], GREEDY)
    assert llm.engine.has_unfinished()
    del stream
    assert not llm.engine.has_unfinished()


def test_streams_read_in_turns_and_beside_generate_lose_nothing(checkpoint, prompts, truth):
    llm = small(checkpoint)
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts[:3]]
    got = [list(next(stream).token_ids) for stream in streams]
    assert tokens(llm.generate(prompts[3:], GREEDY)) == truth[3:]
    for out, stream in zip(got, streams, strict=True):
        out += [t for delta in stream for t in delta.token_ids]
    assert got == truth[:3]


def test_async_streams_are_batched_together_and_closing_one_frees_it(checkpoint, prompts, truth):
    llm = small(checkpoint)
    sizes = []
    llm.engine.events.subscribe(lambda e: sizes.append(e.num_tokens) if isinstance(e, StepFinished) else None)

    async def read(prompt):
        return [t async for delta in llm.astream(prompt, GREEDY) for t in delta.token_ids]

    async def drop(prompt):
        stream = llm.astream(prompt, GREEDY)
        await anext(stream)
        await stream.aclose()

    async def everything():
        return await asyncio.gather(*map(read, prompts), drop(prompts[0]))

    *got, _ = run(everything())
    assert got == truth
    assert max(sizes[6:]) >= 4, "decodes of several streams should share steps"
    assert not llm.engine.has_unfinished() and llm.engine.memory.pool.num_free == llm.engine.num_blocks


def test_threads_may_share_an_llm(checkpoint, prompts, truth):
    llm = small(checkpoint)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda prompt: tokens(llm.generate([prompt], GREEDY))[0], prompts))
    assert got == truth


def test_a_beam_search_cannot_be_streamed(checkpoint):
    with pytest.raises(InvalidRequest, match="cannot be streamed"):
        small(checkpoint).stream([1], SamplingParams(temperature=0, beam_width=2))


def test_a_failed_step_reaches_whoever_waits_and_the_next_request_works(checkpoint, prompts, truth):
    llm = small(checkpoint)
    stream = llm.stream(prompts[0], GREEDY)
    next(stream)
    execute = llm.engine.runner.execute

    def broken(plan):
        raise MemoryError("no room")

    llm.engine.runner.execute = broken
    with pytest.raises(StepFailed, match="no room"):
        llm.generate(prompts, GREEDY)
    llm.engine.runner.execute = execute
    with pytest.raises(StepFailed, match="no room"):
        list(stream)  # it was in the failed batch, so it ends instead of waiting forever
    assert tokens(llm.generate(prompts, GREEDY)) == truth


def test_a_queued_stream_that_is_cancelled_ends_its_thread(checkpoint):
    llm = small(checkpoint, max_num_seqs=1)

    async def cancelled():
        first = llm.astream([1, 2, 3], GREEDY)
        await anext(first)
        waiting = asyncio.ensure_future(anext(llm.astream([4, 5], GREEDY)))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await first.aclose()

    run(cancelled())  # must not wait for the thread forever
    assert not llm.engine.has_unfinished()


def test_ctrl_c_in_one_step_ends_the_streams_of_others(checkpoint):
    llm = small(checkpoint)
    one, other = llm.stream([1, 2], GREEDY), llm.stream([3, 4], GREEDY)
    execute = llm.engine.runner.execute

    def interrupted(plan):
        raise KeyboardInterrupt

    llm.engine.runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(one)
    llm.engine.runner.execute = execute
    deltas = []
    with pytest.raises(StepFailed, match="KeyboardInterrupt"):
        for delta in other:
            deltas.append(delta)
    assert deltas[-1].finish_reason == "abort"


def test_a_stream_whose_request_was_ended_behind_its_back_says_so(checkpoint):
    llm = small(checkpoint)
    stream = llm.stream([1, 2], GREEDY)
    next(stream)
    llm.engine.abort("llm-0")
    with pytest.raises(RuntimeError, match="through llm.engine"):
        next(stream)


def test_a_failed_step_does_not_end_those_who_were_not_in_it(checkpoint, prompts, truth):
    llm = small(checkpoint, max_num_seqs=1)
    running, waiting = llm.stream(prompts[0], GREEDY), llm.stream(prompts[1], GREEDY)
    next(running)
    execute = llm.engine.runner.execute
    failures = iter([MemoryError("no room")])

    def once_broken(plan):
        for failure in failures:
            raise failure
        return execute(plan)

    llm.engine.runner.execute = once_broken
    assert [t for delta in waiting for t in delta.token_ids] == truth[1]
    with pytest.raises(StepFailed, match="no room"):
        list(running)


def test_a_stream_that_the_garbage_collector_drops_in_the_midst_of_a_step_is_closed_after_it(checkpoint):
    llm = small(checkpoint)
    dropped = [llm.stream([1, 2], GREEDY)]
    llm.engine.events.subscribe(lambda event: dropped.clear() if event.type == "filled" else None)
    llm.generate([[3, 4]], GREEDY)
    assert not dropped and not llm.engine.has_unfinished() and not llm._inboxes


def test_a_stream_yields_logprobs_with_their_tokens(checkpoint):
    llm = small(checkpoint)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    for delta in llm.stream([1, 2], params):
        assert [max(entry, key=entry.get) for entry in delta.logprobs] == delta.token_ids
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        llm.stream([1, 2], SamplingParams(prompt_logprobs=1))


def test_two_engines_in_one_process(checkpoint, prompts, truth):
    one, other = small(checkpoint, block_size=3), small(checkpoint, block_size=16)
    streams = [llm.stream(prompts[5], GREEDY) for llm in (one, other)]
    got = [[], []]
    for deltas in zip(*streams, strict=True):
        for out, delta in zip(got, deltas, strict=True):
            out += delta.token_ids
    assert got == [truth[5], truth[5]]


def test_errors_share_one_base():
    for error in (InvalidConfig, InvalidRequest, StepFailed):
        assert issubclass(error, MinipagedError)
