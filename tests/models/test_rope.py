"""Rotary positions against transformers: frequencies of every kind, and dynamic RoPE beyond the trained length."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidConfig, ModelError
from minipaged.models.rope import Rope
from tests.models.families import LLAMA3_ROPE, SMALL, YARN_ROPE, config_of, randomize

LONG = 40  # max_position_embeddings of the dynamic model


def transformers_frequencies(config) -> tuple[torch.Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config)


@pytest.mark.parametrize("new_spelling", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3_ROPE,
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        YARN_ROPE,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},  # as Qwen documents it
        {"rope_type": "yarn", "factor": 4.0},  # the original length is then max_position_embeddings
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.7},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},  # DeepSeek
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.0},
        {"rope_type": "yarn", "factor": 0.5},
        {"rope_type": "yarn", "factor": 16.0, "beta_fast": 4, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},  # both limits at pair 0
    ],
    ids=lambda params: "-".join(map(str, params.values())),
)  # fmt: skip
def test_frequencies_are_those_of_transformers(params, new_spelling):
    for head_dim, theta in ((64, 1e4), (128, 1e6), (20, 500.0)):
        shape = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "max_position_embeddings": 2048}
        if new_spelling:
            given = shape | {"rope_parameters": {"rope_theta": theta} | params}
        else:
            old = {key: value for key, value in params.items() if key not in ("rope_type", "rope_theta")}
            given = shape | {"rope_theta": theta, "rope_scaling": {"type": params["rope_type"]} | old}
        expected, scale = transformers_frequencies(transformers.LlamaConfig(**json.loads(json.dumps(given))))
        rope = Rope.from_config(given)
        torch.testing.assert_close(rope.frequencies(head_dim), expected, rtol=1e-6, atol=0)
        assert rope.attention_factor == pytest.approx(scale, rel=1e-12)


def test_the_original_length_beside_the_parameters_wins():
    given = {"max_position_embeddings": 4096, "original_max_position_embeddings": 256, "rope_parameters": YARN_ROPE}
    assert Rope.from_config(given).original_max_len == 256


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        ({"rope_type": "dynamic", "factor": 2.5}, 2500),
        ({"rope_type": "yarn", "factor": 4.0}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 800}, 3200),
        (LLAMA3_ROPE, 1000),  # always the length after scaling
    ],
)
def test_the_longest_sequence_follows_from_the_scaling(params, expected):
    assert Rope.from_config({"max_position_embeddings": 1000, "rope_parameters": params}).max_len(1000) == expected


@pytest.mark.parametrize(
    ("params", "match"),
    [
        *(({"type": kind}, f"rope type '{kind}' is not supported; default, linear, llama3, yarn, dynamic are")
          for kind in ("longrope", "su", "mrope", "proportional", "ntk")),
        ({"type": "yarn"}, "factor must be a positive number, but is None"),
        ({"type": "dynamic"}, "factor must be"),
        ({"type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate must be true or false"),
        ({"type": "yarn", "factor": 2.0, "attention_factor": -1}, "attention_factor"),
        ({"type": "yarn", "factor": 2.0, "rope_theta": 1}, "rope_theta must be above 1"),
        ({"type": "linear", "factor": float("inf")}, "factor"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}, "must be above low_freq"),
    ],
)  # fmt: skip
def test_what_is_refused(params, match):
    with pytest.raises(ModelError, match=match):
        Rope.from_config({"max_position_embeddings": 128, "rope_scaling": params})


# --- dynamic RoPE beyond the length of the training ---------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A checkpoint with dynamic RoPE, trained for 40 tokens and scaled to 160."""
    config = config_of("llama-dynamic")
    config.update({"max_position_embeddings": LONG, "hidden_size": 64, "head_dim": 16, "eos_token_id": None})
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    directory = tmp_path_factory.mktemp("dynamic")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(dynamic):
    """prompt length → prompt, and the tokens that a fresh transformers model generates."""

    def generate(length: int, count: int):
        prompt = torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        model = transformers.AutoModelForCausalLM.from_pretrained(dynamic, dtype=torch.float32).eval()
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0,
                                 output_logits=True, return_dict_in_generate=True)  # fmt: skip
        return prompt, out.sequences[0, length:].tolist(), torch.cat(out.logits)

    return {length: generate(length, 20) for length in (5, 30, 39, 40, 41, 70, 90)}


@pytest.mark.parametrize("attention", ["torch", "auto"])
def test_dynamic_is_transformers_for_each_sequence_of_a_batch(attention, dynamic, expected):
    """Chunked prompts, preemption and a common batch change nothing; each sequence is as in a fresh model alone."""
    llm = LLM(str(dynamic), device="cpu", dtype="float32", attention=attention, block_size=4, num_blocks=60,
              max_num_seqs=8, max_num_batched_tokens=16)  # fmt: skip
    assert llm.engine.config.max_model_len == 4 * LONG and not llm.engine.config.caches_prefixes
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
    outputs = llm.generate([prompt for prompt, _, _ in expected.values()], params)
    for output, (_, tokens, logits) in zip(outputs, expected.values(), strict=True):
        (one,) = output.outputs
        assert one.token_ids == tokens
        mine = torch.tensor([entry[token] for entry, token in zip(one.logprobs, tokens, strict=True)])
        theirs = logits.float().log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_same_prompt_twice_and_forks_and_lookup(dynamic, expected):
    llm = LLM(str(dynamic), device="cpu", dtype="float32", block_size=4, num_blocks=200, speculate="prompt-lookup")
    prompt, tokens, _ = expected[90]
    for _ in range(2):
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=20, n=2))
        assert [one.token_ids for one in output.outputs] == [tokens, tokens]


def test_up_to_the_trained_length_blocks_are_shared(dynamic, expected):
    llm = LLM(str(dynamic), device="cpu", dtype="float32", block_size=4, num_blocks=60, max_model_len=LONG)
    assert llm.engine.config.caches_prefixes
    prompt, tokens, _ = expected[30]
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=10))
    assert output.outputs[0].token_ids == tokens[:10]


def test_what_dynamic_excludes_is_refused(dynamic, caplog):
    with pytest.raises(InvalidConfig, match="enable_prefix_caching=True and dynamic RoPE.*max_model_len to 40"):
        LLM(str(dynamic), device="cpu", num_blocks=60, enable_prefix_caching=True)
    LLM(str(dynamic), device="cpu", num_blocks=60)
    assert "the prefix cache is off" in caplog.text
    caplog.clear()
    LLM(str(dynamic), device="cpu", num_blocks=60, enable_prefix_caching=False)
    assert not caplog.text


def test_the_scaling_matters(dynamic, expected):
    """Without it the tokens differ: equality above would prove nothing otherwise."""
    assert SMALL["max_position_embeddings"] != LONG
    config = json.loads((dynamic / "config.json").read_text())
    plain = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 160}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dynamic, config=transformers.LlamaConfig(**plain), dtype=torch.float32
    )
    prompt, tokens, _ = expected[90]
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert out[0, 90:].tolist() != tokens
