"""Beam search on the paged engine: the same hypotheses as transformers, with any block size and preemption."""

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.events import Copied, Preempted
from tests.checkpoints import save_llama

PROMPTS = [[5, 6, 7], [9] * 16, list(range(20, 41))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Flatter distributions than elsewhere, and three end-of-text tokens, so that beams compete, end and fork often.
    return save_llama(tmp_path_factory.mktemp("llama"), initializer_range=0.08, vocab_size=60, eos_token_id=[2, 17, 31])


@pytest.fixture(scope="module")
def reference(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def transformers_beams(model, prompt, params):
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            num_beams=params.beam_width,
            num_return_sequences=params.n,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            max_new_tokens=params.max_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None if params.ignore_eos else [2, 17, 31],
        )
    rows = [row[len(prompt) :].tolist() for row in out]
    return [row[: next((i + 1 for i, t in enumerate(row) if t in (2, 17, 31)), None)] for row in rows]


def beams(checkpoint, prompts, params, **settings):
    llm = LLM(str(checkpoint), **({"num_blocks": 200, "block_size": 4, "max_num_seqs": 8} | settings))
    seen = []
    llm.engine.events.subscribe(seen.append)
    outputs = llm.generate(prompts, params)
    llm.engine.check()
    assert llm.engine.memory.pool.num_free == llm.engine.num_blocks
    return [[out.token_ids for out in output.outputs] for output in outputs], seen


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_equal_transformers(checkpoint, reference, width, early_stopping, length_penalty):
    params = SamplingParams(
        temperature=0,
        beam_width=width,
        n=width,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        max_tokens=24,
    )
    found, seen = beams(checkpoint, PROMPTS, params)
    assert found == [transformers_beams(reference, prompt, params) for prompt in PROMPTS]
    assert any(isinstance(event, Copied) for event in seen)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_beams_survive_preemption(checkpoint, reference, preemption):
    params = SamplingParams(temperature=0, beam_width=3, n=2, max_tokens=24)
    settings = {"num_blocks": 26, "preemption": preemption, "max_num_batched_tokens": 12}
    found, seen = beams(checkpoint, PROMPTS * 2, params, **settings)
    assert found == [transformers_beams(reference, prompt, params) for prompt in PROMPTS * 2]
    modes = {event.mode for event in seen if isinstance(event, Preempted)}
    assert modes == {preemption}


def test_one_beam_is_greedy(checkpoint):
    llm = LLM(str(checkpoint), num_blocks=100)
    greedy, beam = llm.generate(
        [PROMPTS[0]] * 2,
        [SamplingParams(temperature=0), SamplingParams(temperature=0, beam_width=1, early_stopping=True)],
    )
    assert beam.outputs[0].token_ids == greedy.outputs[0].token_ids


def test_scores_are_reported_best_first(checkpoint):
    llm = LLM(str(checkpoint), num_blocks=100)
    params = SamplingParams(temperature=0, beam_width=4, n=4, logprobs=2, max_tokens=10, ignore_eos=True)
    outs = llm.generate([PROMPTS[1]], params)[0].outputs
    scores = [out.cumulative_logprob for out in outs]
    assert scores == sorted(scores, reverse=True)
    for out in outs:
        chosen = [entry[token] for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        assert sum(chosen) == pytest.approx(out.cumulative_logprob)


@pytest.mark.parametrize(
    "settings",
    [
        {"beam_width": 0},
        {"beam_width": 2, "n": 3},
        {"beam_width": 2, "temperature": 1},
        {"beam_width": 2, "stop": "x"},
        {"beam_width": 2, "presence_penalty": 1},
        {"beam_width": 2, "early_stopping": "soon"},
        {"length_penalty": 2},
        {"early_stopping": True},
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(InvalidRequest):
        SamplingParams(**({"temperature": 0} | settings))


def test_more_beams_than_sequences_are_refused(checkpoint):
    llm = LLM(str(checkpoint), num_blocks=100, max_num_seqs=3)
    with pytest.raises(InvalidRequest, match="beam_width is 4"):
        llm.generate([PROMPTS[0]], SamplingParams(temperature=0, beam_width=4))
