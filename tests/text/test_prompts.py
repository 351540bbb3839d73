"""What is taken for a prompt, and what is refused: by its type, or as text that is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidRequest
from tests.aio import run
from tests.checkpoints import save_llama

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(checkpoint):
    return LLM(str(checkpoint), device="cpu", num_blocks=16)


@pytest.fixture(scope="module")
def tiny():
    return LLM("tiny", device="cpu", num_blocks=16)


@pytest.mark.parametrize(
    "prompts",
    [
        {"prompt_token_ids": [3, 4]},
        [{"prompt_token_ids": (3, 4)}],
        [np.int64(3), np.uint8(4)],
        (3, 4),
        [(3, np.int32(4))],
        iter([[3, 4]]),
        {"prompt": None, "prompt_token_ids": [3, 4]},
    ],
    ids=lambda prompts: (
        type(prompts).__name__
    ),  # the repr of an iterator has its address, which differs in each process
)
def test_token_ids_in_every_form_that_vllm_and_numpy_give_them(llm, prompts):
    (output,) = llm.generate(prompts, GREEDY)
    assert output.prompt_token_ids == [3, 4]
    assert {type(token) for token in output.prompt_token_ids} == {int}
    assert output.outputs == llm.generate([[3, 4]], GREEDY)[0].outputs


@pytest.mark.parametrize(
    "prompts, message",
    [
        (b"abc", "not bytes: decode it"),
        (bytearray(b"abc"), "not bytearray: decode it"),
        ({1, 2}, "not set: it has no order"),
        ({3: "a", 4: "b"}.keys(), "not dict_keys: it has no order"),
        ({3: "a", 4: "b"}, "dict has the keys 'prompt' or 'prompt_token_ids', not 3, 4"),
        ({}, "not none"),
        ({"prompt": None}, "is not None"),
        ({"prompt": 5}, "must be text, not int"),
        ({"prompt_token_ids": "ab"}, "list of token ids, not str"),
        ({"prompt_token_ids": [1], "multi_modal_data": {}}, "'multi_modal_data'"),
        (transformers.BatchEncoding({"input_ids": [3, 4]}), "give the list of its input_ids"),
        ([transformers.BatchEncoding({"input_ids": [3, 4]})], "give the list of its input_ids"),
        (np.array([3, 4]), r"not numpy.ndarray: give the list that its method tolist\(\) returns"),
        ([torch.tensor([3, 4])], r"not torch.Tensor: give the list that its method tolist\(\) returns"),
        (torch.tensor([3, 4]), "not torch.Tensor"),
        ([torch.tensor(3)], "not torch.Tensor: give token ids"),
        (5, "not int: give token ids"),
        (None, "not NoneType"),
        ([[3], None], "not NoneType"),
        ([3, "a"], "not int"),
        ([True, False], "token id True"),
        ([3.0, 4.0], "token id 3.0"),
        ([np.True_], "not numpy.bool"),
        (range(3), "not range"),
        ([[]], "the prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_type(llm, prompts, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("ids", [{3: 4}, {3, 4}, b"ab", np.array([3, 4]), "ab", None])
def test_the_engine_itself_takes_a_list_of_token_ids(llm, ids):
    with pytest.raises(InvalidRequest, match="give a list of token ids"):
        llm.engine.add_request("r", ids)


def test_a_prompt_with_text_and_token_ids_is_read_by_its_token_ids(tiny):
    both, text, alone = tiny.generate(
        [{"prompt": "Once", "prompt_token_ids": [5, 6]}, {"prompt": "Once"}, "Once"], SamplingParams(max_tokens=1)
    )
    assert (both.prompt, both.prompt_token_ids) == ("Once", [5, 6])
    assert (text.prompt, text.prompt_token_ids) == (alone.prompt, alone.prompt_token_ids)


def test_a_model_is_named_by_a_path_too(checkpoint):
    llm = LLM(Path(checkpoint), num_blocks=16, device="cpu")
    assert llm.engine.config.model == str(checkpoint)


LONE = "half \ud83d of an emoji"


def test_half_of_a_surrogate_pair_is_refused_at_every_door(tiny):
    llm = tiny
    talk = [{"role": "user", "content": LONE}]
    doors = [
        lambda: llm.generate(LONE),
        lambda: llm.generate(["fine", LONE]),
        lambda: llm.generate({"prompt": LONE}),
        lambda: llm.generate({"prompt": LONE, "prompt_token_ids": [1]}),
        lambda: llm.stream(LONE),
        lambda: llm.encode(LONE),
        lambda: llm.chat(talk),
        lambda: llm.stream_chat(talk),
        lambda: SamplingParams(stop=LONE),
        lambda: SamplingParams(stop=["a", LONE]),
        lambda: llm.engine.add_request(LONE, [1]),
        lambda: run(anext(llm.astream(LONE))),
    ]
    for door in doors:
        with pytest.raises(InvalidRequest, match="half of a surrogate pair") as caught:
            door()
        str(caught.value).encode()  # the message itself can be printed
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([{"role": "user", "content": "x", LONE: 1}])
    str(caught.value).encode()
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("prompt", ["half \ud800", 5, b"bytes"])
def test_the_text_that_a_request_carries_along_is_text(llm, prompt):
    with pytest.raises(InvalidRequest, match="^prompt (holds|must be text)"):
        llm.engine.add_request("a", [3, 4], GREEDY, prompt=prompt)
    assert not llm.engine.has_unfinished()
