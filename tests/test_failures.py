"""One request's trouble is its own: it ends with an error that says why, and the others get their tokens."""

import threading

import pytest
import torch
import transformers

from minipaged import LLM, SamplingParams
from minipaged.errors import RequestFailed, StepFailed
from tests.aio import run
from tests.checkpoints import save_llama

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model in which token 7 has an embedding of NaN: requests that contain it fail."""
    directory = save_llama(tmp_path_factory.mktemp("poisoned"), tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    model.save_pretrained(directory)
    return directory


GOOD, BAD = [[3, 4, 5], [20] * 20, [9, 10, 11, 12]], [[7, 3], [3, 7], [5] * 10 + [7] * 3]
KINDS = [
    {"temperature": 0},
    {"seed": 5, "top_k": 40, "n": 2, "logprobs": 2},
    {"temperature": 0, "beam_width": 2, "n": 2},
]
ENGINES = [
    {"attention": "torch"},
    {"attention": "auto", "preemption": "swap"},
    {"speculate": "prompt-lookup"},
    {"attention": "torch", "kv_dtype": "int8"},
]


def outcomes(llm, prompts, params):
    """What a generate call gives for each prompt: tokens, finish reasons, and whether it failed."""
    try:
        outputs = llm.generate(prompts, params)
    except RequestFailed as error:
        outputs = error.outputs
    return [
        ([o.token_ids for o in out.outputs], [o.finish_reason for o in out.outputs], out.error is not None)
        for out in outputs
    ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("settings", ENGINES, ids=str)
def test_a_request_of_nan_fails_alone_and_its_blocks_harm_no_other(poisoned, settings, kind):
    llm = LLM(str(poisoned), device="cpu", dtype="float32", num_blocks=24, block_size=4, max_num_seqs=8,
              max_num_batched_tokens=16, **settings)  # fmt: skip
    params = SamplingParams(max_tokens=12, ignore_eos=True, **kind)
    alone = [outcomes(llm, [prompt], params)[0] for prompt in GOOD]
    together = outcomes(llm, [prompt for pair in zip(GOOD, BAD, strict=True) for prompt in pair], params)
    assert together[::2] == alone
    assert all(failed and set(reasons) == {"error"} for _, reasons, failed in together[1::2])
    assert [outcomes(llm, [prompt], params)[0] for prompt in GOOD] == alone  # on blocks that held NaN
    llm.engine.check()
    assert llm.engine.memory.pool.num_free == llm.engine.memory.pool.num_blocks


def test_a_failed_request_raises_and_says_which_it_was(poisoned):
    llm = LLM(str(poisoned), device="cpu", dtype="float32", num_blocks=24, attention="torch")
    with pytest.raises(RequestFailed, match="^no token can be drawn: the model's logits are NaN"):
        llm.generate([7], GREEDY)
    with pytest.raises(RequestFailed, match=r"^prompt 1 of 2 \(1 failed\): no token can be drawn") as caught:
        llm.generate([[3], [7]], GREEDY)
    assert not isinstance(caught.value, StepFailed)
    assert [output.error is None for output in caught.value.outputs] == [True, False]
    deltas = []
    with pytest.raises(RequestFailed, match="no token can be drawn"):
        for delta in llm.stream([7], GREEDY):
            deltas.append(delta)
    assert [delta.finish_reason for delta in deltas] == ["error"]

    async def streamed():
        async for _ in llm.astream([7], GREEDY):
            pass

    with pytest.raises(RequestFailed, match="no token can be drawn"):
        run(streamed())


def test_an_engine_tells_its_subscribers_of_a_request_that_failed(poisoned):
    llm = LLM(str(poisoned), device="cpu", dtype="float32", num_blocks=24, attention="torch")
    told = []
    llm.engine.events.subscribe(told.append)
    with pytest.raises(RequestFailed):
        llm.generate([7], GREEDY)
    messages = [event.message for event in told if event.type == "engine_error"]
    assert len(messages) == 1 and messages[0].startswith("llm-0 failed: no token can be drawn")


def test_a_neighbours_failed_step_is_an_exception_for_every_thread(poisoned):
    """Two threads generate; the step that fails is run by one of them, and both requests were in it."""
    llm = LLM(str(poisoned), device="cpu", dtype="float32", num_blocks=64)
    execute, ready = llm.engine.runner.execute, threading.Barrier(2)
    caught = []

    def broken(plan):
        if len({chunk.request for chunk in plan.chunks}) == 2:
            raise MemoryError("no room")
        return execute(plan)

    def work(prompt):
        ready.wait()
        try:
            caught.append(llm.generate([prompt], SamplingParams(max_tokens=100, ignore_eos=True)))
        except StepFailed as error:
            caught.append(error)

    llm.engine.runner.execute = broken
    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in ([1, 2], [3, 4])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    llm.engine.runner.execute = execute
    reasons = {out.finish_reason for one in caught if isinstance(one, list) for out in one[0].outputs}
    assert len(caught) == 2 and "abort" not in reasons
    failed = [error for error in caught if isinstance(error, StepFailed)]
    assert len(failed) in (0, 2), "in a step of both, both failed"
    assert len(set(map(id, failed))) == len(failed)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_model_that_computes_nan_only_guesses_wrong(poisoned, tmp_path, temperature):
    model = transformers.LlamaForCausalLM.from_pretrained(poisoned)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 24, "attention": "torch"}
    llm = LLM(str(poisoned), speculate=str(tmp_path), **settings)
    params = SamplingParams(temperature=temperature, max_tokens=8, ignore_eos=True, seed=1)
    got = outcomes(llm, [[3, 4, 5], [7]], params)
    assert [failed for _, _, failed in got] == [False, True]
    if temperature == 0:
        assert got[0] == outcomes(LLM(str(poisoned), **settings), [[3, 4, 5]], params)[0]
    assert len(got[0][0][0]) == 8
