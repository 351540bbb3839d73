"""The model's own sampling parameters: what ``generation_config.json`` states is the default everywhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from minipaged import LLM, SamplingParams
from minipaged.cli.options import own_sampling
from minipaged.errors import ModelError
from minipaged.models.loader import load_model


@pytest.fixture
def directory(checkpoint, tmp_path) -> Path:
    """A checkpoint without ``generation_config.json``."""
    directory = Path(shutil.copytree(checkpoint("llama2"), tmp_path / "model"))
    (directory / "generation_config.json").unlink()
    return directory


def test_sampling_parameters_of_the_generation_config_are_the_defaults(directory):
    stated = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    unread = {"do_sample": False, "max_length": 20, "num_beams": 4, "penalty_alpha": None}
    (directory / "generation_config.json").write_text(json.dumps(stated | unread))
    llm = LLM(str(directory), device="cpu", num_blocks=20)
    assert llm.default_params == SamplingParams(**stated)
    params, line = own_sampling(llm, {"temperature": 0.2, "seed": 3}, temperature=0.7)
    assert params == SamplingParams(**stated | {"temperature": 0.2, "seed": 3})
    assert line == (
        "sampling: temperature 0.2 — as given; top_p 0.95, top_k 20, min_p 0.05, repetition_penalty 1.1"
        " — from generation_config.json"
    )
    llm.default_params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    greedy = llm.generate([5, 6], llm.default_params)[0].outputs
    assert llm.generate([5, 6])[0].outputs == greedy and len(greedy[0].token_ids) == 4
    assert [token for delta in llm.stream([5, 6]) for token in delta.token_ids] == greedy[0].token_ids


def test_a_byte_order_mark_and_deep_nesting(directory):
    file = directory / "generation_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"temperature": 0.3}')  # as Windows' editors write it
    assert load_model(str(directory), device="cpu").generation_config == {"temperature": 0.3}
    file.write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read as JSON"):
        load_model(str(directory), device="cpu")


@pytest.mark.parametrize("content", [None, "{}", '{"eos_token_id": 5, "temperature": null, "top_k": -1}'])
def test_without_a_stated_temperature(content, directory):
    if content:
        (directory / "generation_config.json").write_text(content)
    llm = LLM(str(directory), device="cpu", num_blocks=20)
    assert llm.default_params == SamplingParams()
    params, line = own_sampling(llm, {}, temperature=0.7)
    if content and "top_k" in content:
        assert params.temperature == 1.0 and line.startswith("sampling: top_k 0 — from generation_config.json")
    else:
        assert params.temperature == 0.7 and line == "sampling: temperature 0.7 — the default"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"temperature": "0.7"}', "temperature must be a number between 0 and 100, not '0.7'"),
        ('{"temperature": NaN}', "temperature must be a number"),
        ('{"top_p": 0}', "top_p must be above 0"),
        ('{"top_p": 1.5}', "top_p must be a number between 0 and 1, not 1.5"),
        ('{"top_k": 2.5}', "top_k must be a whole number"),
        ('{"min_p": true}', "min_p must be a number"),
        ('{"repetition_penalty": [1]}', "repetition_penalty must be a number"),
        ("[]", "holds a list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_generation_config_is_named(content, complaint, directory):
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=re.escape(complaint)) as error:
        load_model(str(directory), "cpu")
    assert "generation_config.json" in str(error.value)
