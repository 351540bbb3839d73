"""A real model, SmolLM2-135M-Instruct in 4 bits: its tokens equal transformers', and no feature changes them.

The file is not part of the repository: `make real-model` downloads it. `tests.real_model` says what the reference is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.core.engine import Engine
from minipaged.events import SwappedOut
from minipaged.outputs import CompletionOutput
from tests.real_model import CI, CLOSE, FILE, NEW_TOKENS, PROMPTS, REFERENCE, SHA256, digest, ids

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is missing; `make real-model` downloads it (93 MB)"),
]
LENGTH = 14
NUM_BLOCKS = 416  # 6,656 tokens: the longest prompt and its answer


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(FILE, device="cpu", dtype="float32", num_blocks=NUM_BLOCKS)


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    reference = json.loads(REFERENCE.read_text())
    assert reference["file"] == SHA256
    return reference["answers"]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[CompletionOutput]]:
    """The outputs of an engine for prompts that come at once; checks its bookkeeping after every step."""
    done = {}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output.outputs
        engine.check()
    return [done[str(number)] for number in range(len(prompts))]


# --- transformers' tokens ---------------------------------------------------------------------------------------------


def compare(llm: LLM, numbers: list[int], answers: list[dict[str, Any]]) -> int:
    """Generates from these prompts and compares with the reference; returns how many ties went the other way.

    At a tie (`CLOSE`) the output continues from the reference's token, so that all positions are compared.
    """
    prompts = {number: ids(PROMPTS[number], llm.tokenizer) for number in numbers}
    for number, prompt in prompts.items():
        same = (len(prompt), digest(prompt)) == (answers[number]["num_tokens"], answers[number]["digest"])
        assert same, (
            f"prompt {number} has other tokens now; if its text has changed: python -m tests.real_model reference"
        )
    done, ties = dict.fromkeys(numbers, 0), 0
    while done:
        inputs = [prompts[number] + answers[number]["tokens"][:at] for number, at in done.items()]
        params = [greedy(NEW_TOKENS - at) for at in done.values()]
        outputs = llm.generate(inputs, params)
        left = {}
        for (number, at), output in zip(done.items(), outputs, strict=True):
            expected, gaps = answers[number]["tokens"][at:], answers[number]["gaps"][at:]
            if (wrong := first_difference(output.outputs[0].token_ids, expected)) is None:
                continue
            assert gaps[wrong] <= CLOSE, f"prompt {number}, token {at + wrong}: the best logits are {gaps[wrong]} apart"
            ties += 1
            if at + wrong + 1 < NEW_TOKENS:
                left[number] = at + wrong + 1
        done = left
    return ties


def first_difference(tokens: list[int], expected: list[int]) -> int | None:
    assert len(tokens) == len(expected)
    return next((at for at, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)


def test_the_reference_covers_short_and_long_prompts(answers):
    sizes = [answer["num_tokens"] for answer in answers]
    assert len(answers) == len(PROMPTS) == 20 and sum(1000 <= size <= 6100 for size in sizes) >= 8
    assert all(len(answer["tokens"]) == len(answer["gaps"]) == NEW_TOKENS for answer in answers)
    assert max(sizes) > 6000 and max(sizes[number] for number in CI) > 1000
    gaps = [gap for answer in answers for gap in answer["gaps"]]
    assert sum(gap <= CLOSE for gap in gaps) < 20, "nearly all positions count"


def test_tokens_equal_those_of_transformers(llm, answers):
    assert compare(llm, list(CI), answers) < 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [number for number in range(len(PROMPTS)) if number not in CI])
def test_tokens_of_all_prompts_equal_those_of_transformers(number, llm, answers):
    assert compare(llm, [number], answers) < 4


# --- nothing changes them ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(llm: LLM) -> tuple[list[list[int]], list[CompletionOutput]]:
    """Prompts with a common beginning, and their outputs without prefix cache: each computes all of its tokens."""
    messages = "You are given a list of fruits: apple, banana, cherry, date, elderberry, fig, grape. "
    asks = ("Repeat the list.", "Name the first fruit.", "Count to ten.", "Which fruits are red?")
    prompts = [llm.render_chat([{"role": "user", "content": messages + ask}]) for ask in asks]
    engine = llm.build_engine(replace(llm.engine.config, num_blocks=64, enable_prefix_caching=False))
    return prompts, [output for (output,) in run(engine, prompts, greedy(LENGTH, logprobs=2))]


def same(output: CompletionOutput, expected: CompletionOutput) -> bool:
    """Whether the tokens are equal up to the first position at which rounding may decide."""
    assert expected.logprobs is not None and len(output.token_ids) == len(expected.token_ids)
    where = first_difference(output.token_ids, expected.token_ids)
    if where is None:
        return True
    best, second = sorted(expected.logprobs[where].values(), reverse=True)[:2]
    return best - second <= CLOSE


def test_prefix_hits_change_nothing(llm, plain):
    prompts, expected = plain
    admitted: list[int] = []
    engine = llm.build_engine(replace(llm.engine.config, num_blocks=64))
    engine.events.subscribe(lambda event: admitted.append(event.num_cached) if event.type == "admitted" else None)
    for _ in range(2):
        for (output,), one in zip(run(engine, prompts, greedy(LENGTH)), expected, strict=True):
            assert same(output, one)
    assert min(admitted[-4:]) >= 48, "the second time all full blocks are hits"


def test_swapping_and_parallel_samples_change_nothing(llm, plain):
    """A pool that is too small for four requests of four sequences: they fork, copy, and are swapped out and in."""
    prompts, expected = plain
    swapped: list[object] = []
    config = replace(llm.engine.config, num_blocks=26, preemption="swap", enable_prefix_caching=False)
    engine = llm.build_engine(config)
    engine.events.subscribe(lambda event: swapped.append(event) if isinstance(event, SwappedOut) else None)
    for outputs, one in zip(run(engine, prompts, greedy(LENGTH, n=4)), expected, strict=True):
        assert len(outputs) == 4 and all(same(output, one) for output in outputs)
    assert swapped
    # Each of four seeded samples is what it would be alone.
    params = SamplingParams(n=4, temperature=0.8, seed=5, max_tokens=8, ignore_eos=True)
    (four,) = run(engine, prompts[:1], params)
    assert len({tuple(one.token_ids) for one in four}) > 1
    (alone,) = run(engine, prompts[:1], replace(params, n=1))
    assert alone[0].token_ids == four[0].token_ids


def test_drafts_from_the_prompt_change_nothing(llm, plain):
    prompts, expected = plain
    engine = llm.build_engine(replace(llm.engine.config, num_blocks=64, speculate="prompt-lookup"))
    drafted: list[str] = []
    engine.events.subscribe(lambda event: drafted.append(event.type))
    for (output,), one in zip(run(engine, prompts, greedy(LENGTH)), expected, strict=True):
        assert same(output, one)
    assert drafted.count("scheduled") < 4 * LENGTH, "drafts were accepted: fewer steps than tokens"


def test_beams_are_those_of_a_search_that_recomputes_everything(llm, plain):
    prompt, width, steps = plain[0][1], 3, 4
    engine = llm.build_engine(replace(llm.engine.config, num_blocks=64, enable_prefix_caching=False))
    (found,) = run(engine, [prompt], greedy(steps, beam_width=width, n=width, logprobs=0))
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        inputs = [prompt + tokens for _, tokens in beams]
        nexts = [outputs[0].logprobs[0] for outputs in run(engine, inputs, greedy(1, logprobs=2 * width))]
        longer = [
            (score + logprob, [*tokens, token])
            for (score, tokens), best in zip(beams, nexts, strict=True)
            for token, logprob in best.items()
        ]
        beams = sorted(longer, key=lambda beam: -beam[0])[:width]
    assert [output.token_ids for output in found] == [tokens for _, tokens in beams]
    scores = torch.tensor([output.cumulative_logprob for output in found])
    torch.testing.assert_close(scores, torch.tensor([score for score, _ in beams]), atol=1e-3, rtol=0)


def test_a_chat_of_six_turns_equals_recomputation(llm):
    """Each turn finds those before it in the prefix cache, and answers with the likeliest tokens without cache.

    That is checked by requests for `prompt_logprobs`, which do not use the cache.
    """
    cached: list[int] = []
    llm.engine.events.subscribe(lambda event: cached.append(event.num_cached) if event.type == "admitted" else None)
    messages: list[dict[str, str]] = []
    turns: list[tuple[list[int], list[int]]] = []
    for ask in ("Hi, I am Ada.", "Name a colour.", "And another?", "What is 2 + 2?", "Thanks!", "What is my name?"):
        messages.append({"role": "user", "content": ask})
        prompt = llm.render_chat(messages)
        output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=8)).outputs[0]
        turns.append((prompt, output.token_ids))
        messages.append({"role": "assistant", "content": output.text})
    assert cached[-1] > cached[1] > 0 and cached[-1] > 0.7 * len(turns[-1][0])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    for (prompt, answer), whole in zip(turns, llm.generate([p + a for p, a in turns], params), strict=True):
        for token, likeliest in zip(answer, whole.prompt_logprobs[len(prompt) :], strict=True):
            assert likeliest[token] >= max(likeliest.values()) - CLOSE


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(llm):
    import transformers

    loaded = llm._loaded
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights = {f"model.{name}": view.contiguous() for name, view in loaded.model.checkpoint_views()}
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    theirs.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    prompts = [ids(replace(PROMPTS[12], start=start, length=80), llm.tokenizer) for start in (2000, 6000)]
    with torch.inference_mode():
        exact = [theirs(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]
        theirs = theirs.to(torch.bfloat16)
        rounded = [theirs(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in prompts]
    half = LLM(FILE, device="cpu", dtype="bfloat16", num_blocks=32)
    assert half._loaded.dtype == torch.bfloat16
    likeliest = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20)

    def error(rows: list[list[dict[int, float]]]) -> float:
        """Root mean square error of the log-probabilities of the 20 likeliest tokens at each position."""
        squares = [
            (float(right[at, token]) - logprob) ** 2
            for one, right in zip(rows, exact, strict=True)
            for at, best in enumerate(one)
            for token, logprob in best.items()
        ]
        return (sum(squares) / len(squares)) ** 0.5

    def of(model: LLM) -> float:
        return error([output.prompt_logprobs[1:] for output in model.generate(prompts, likeliest)])

    best = [one.topk(20) for one in rounded]
    yours = error(
        [
            [dict(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
            for top in best
        ]
    )
    float32, mine = of(llm), of(half)
    print(f"error: float32 {float32:.2g}, bfloat16 {mine:.3g}, transformers' bfloat16 {yours:.3g}")
    assert float32 < 1e-4 and mine <= 1.1 * yours


def test_the_file_s_metadata(llm):
    spec, tokenizer = llm._loaded.spec, llm.tokenizer
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.vocab_size, spec.max_model_len, spec.eos_token_ids) == (49152, 8192, {2})
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"
    chat = tokenizer.decode(llm.render_chat([{"role": "user", "content": "Hi"}]))
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # Single digits, and spaces that do not stick to them; transformers' reading of this file gives other ids.
    assert tokenizer("  2024")["input_ids"] == [256, 34, 32, 34, 36]
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0))
    assert answer.outputs[0].text == "The capital of France is Paris." and answer.outputs[0].finish_reason == "stop"
