"""Speculation changes the speed, but neither tokens nor probabilities: on real models, with equal seeds."""

from collections import Counter
from random import Random

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidConfig
from minipaged.features import full_sampler as sampler
from minipaged.features.speculative.drafts import speculation_of
from tests.checkpoints import VOCAB, save_llama

PROMPTS = [[5, 6, 7, 8] * 4, [20, 21, 22], list(range(30, 71)), [9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """A smaller draft model, some of whose tokens are accepted."""
    return str(save_llama(tmp_path_factory.mktemp("draft"), num_hidden_layers=2))


def engine(model, **settings):
    sizes = {"num_blocks": 80, "block_size": 4, "max_num_seqs": 8, "dtype": "float32", "device": "cpu"}
    return LLM(model, **(sizes | settings))


def results(llm, params):
    outputs = [out for output in llm.generate(PROMPTS, params) for out in output.outputs]
    llm.engine.check()
    assert llm.engine.memory.pool.num_free == llm.engine.num_blocks
    return outputs


def assert_same(outputs, truth):
    assert [(out.token_ids, out.finish_reason) for out in outputs] == [(t.token_ids, t.finish_reason) for t in truth]
    for out, other in zip(outputs, truth, strict=True):
        for ours, theirs in zip(out.logprobs, other.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)


def chi_square(seen, expected):
    """Asserts that counts follow probabilities: chi-square is at most four standard deviations above its mean."""
    total, freedom = sum(seen.values()), sum(p > 0 for p in expected.values()) - 1
    assert not [key for key in seen if not expected.get(key)], "an outcome of probability 0 occurred"
    chi2 = sum((seen[key] - total * p) ** 2 / (total * p) for key, p in expected.items() if p > 0)
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 4, f"chi-square {chi2:.1f} at {freedom} degrees of freedom"


TARGET = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0], [0.5, 0.1, 0.1, 0.1, 0.2], [0.05, 0.05, 0.2, 0.3, 0.4]])
GUESSES = {
    "close": [[0.2, 0.3, 0.2, 0.3, 0.0], [0.4, 0.2, 0.1, 0.2, 0.1]],
    "equal": TARGET[:2].tolist(),
    "impossible": [[0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.5, 0.5, 0.0]],
    "certain": [[0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("name", GUESSES)
def test_rejection_sampling_follows_the_model_whatever_was_guessed(name):
    guess, rng = torch.tensor(GUESSES[name]), Random(7)
    at = [Counter(), Counter(), Counter()]
    for _ in range(2500):
        draft = [rng.choices(range(5), row)[0] for row in GUESSES[name]]
        for place, token in zip(at, sampler.rejection_sample(TARGET, guess, draft, rng), strict=False):
            place[token] += 1
    for place, row in zip(at, TARGET.tolist(), strict=True):  # here, positions are independent
        if place:
            chi_square(place, dict(enumerate(row)))
    accepted = sum(at[1].values()) / sum(at[0].values())  # the optimal rate: the overlap of both distributions
    assert accepted == pytest.approx(float(torch.minimum(TARGET[0], guess[0]).sum()), abs=0.05)


def test_with_a_draft_model_whole_texts_are_as_likely_as_without(tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "eos_token_id": 10}
    model = str(save_llama(tmp_path / "model", **sizes, initializer_range=0.4))
    draft = str(save_llama(tmp_path / "draft", **sizes, initializer_range=0.4, num_hidden_layers=1))
    filters = {"top_k": 3, "temperature": 1.5, "ignore_eos": True, "frequency_penalty": 2.0}
    plain = engine(model, max_num_seqs=32)

    def next_probs(text):
        """The next token's distribution, computed from the model's log-probabilities by the documented formulas."""
        row = SamplingParams(max_tokens=1, logprobs=11, ignore_eos=True)
        (logprobs,) = plain.generate([3, 4, *text], row)[0].outputs[0].logprobs
        scores = {token: (value - 2.0 * text.count(token)) / 1.5 for token, value in logprobs.items()}
        top = sorted(scores, key=lambda token: -scores[token])[:3]
        probs = torch.tensor([scores[token] for token in top]).softmax(0).tolist()
        return dict(zip(top, probs, strict=True))

    expected = {(): 1.0}
    for _ in range(4):
        expected = {
            (*text, token): p * q for text, p in expected.items() for token, q in next_probs(list(text)).items()
        }
    sizes = {"max_num_seqs": 64, "num_blocks": 400, "max_num_batched_tokens": 512}
    llm = engine(model, **sizes, speculate=draft, num_speculative_tokens=2)
    params = SamplingParams(max_tokens=4, **filters)
    seen = Counter(tuple(out.outputs[0].token_ids) for out in llm.generate([[3, 4]] * 1000, params))
    assert set(seen) <= set(expected)
    likely = {text: p for text, p in expected.items() if p * 1000 >= 5}
    rest = {"rest": 1 - sum(likely.values())} if len(likely) < len(expected) else {}
    seen["rest"] = sum(count for text, count in seen.items() if text not in likely)
    chi_square(Counter({text: seen[text] for text in (*likely, *rest)}), likely | rest)
    assert 0 < speculation_of(llm.engine).num_accepted < speculation_of(llm.engine).num_proposed


def knowing(llm, truth, params, right=0.8):
    """Drafts from the sequences generated without speculation, a fraction of tokens wrong. Returns the stage."""
    random, texts = Random(11), {}
    for index, out in enumerate(truth):
        texts[tuple(PROMPTS[index // params.n]), index % params.n] = out.token_ids

    def propose(seq, count):
        request = next(r for r in llm.engine.scheduler.running if seq in r.seqs)
        text = texts[tuple(request.prompt_token_ids), request.seqs.index(seq)]
        guess = text[seq.num_output : seq.num_output + count]
        return [token if random.random() < right else random.randrange(VOCAB) for token in guess]

    speculation = speculation_of(llm.engine)
    speculation.propose = propose
    return speculation


KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, logprobs=2),
    "filters": SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=4, max_tokens=24, logprobs=0),
    "penalties": SamplingParams(
        seed=5, repetition_penalty=1.4, presence_penalty=0.4, frequency_penalty=0.7, logit_bias={9: 3.0}, logprobs=1,
        min_tokens=9, stop_token_ids=list(range(0, VOCAB, 4)), max_tokens=24,
    ),
    "samples": SamplingParams(n=3, seed=6, max_tokens=20, logprobs=1, prompt_logprobs=1),
}  # fmt: skip
ENGINES = {
    "roomy": {},
    "recompute": {"num_blocks": 24, "max_num_batched_tokens": 20},
    "swap": {"num_blocks": 24, "preemption": "swap", "swap_blocks": 24},
    "one token a block": {"block_size": 1, "num_blocks": 200},
    "contiguous": {"memory": "orca-pow2", "num_blocks": 256},
    "vattention": {"memory": "vattention", "block_size": None},
    "torch": {"attention": "torch", "block_size": 16},
}


@pytest.fixture(scope="module")
def truths(model):
    plain = engine(model)
    return {kind: results(plain, params) for kind, params in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", ENGINES)
def test_a_seed_gives_the_same_tokens_whatever_is_guessed(model, truths, kind, settings):
    llm = engine(model, speculate="prompt-lookup", num_speculative_tokens=3, **ENGINES[settings])
    speculation = knowing(llm, truths[kind], KINDS[kind])
    assert_same(results(llm, KINDS[kind]), truths[kind])
    assert 0 < speculation.num_accepted < speculation.num_proposed


def test_prompt_lookup_guesses_by_itself(model, truths):
    llm = engine(model, speculate="prompt-lookup")
    repeating = SamplingParams(temperature=0, max_tokens=24, logprobs=2, logit_bias={7: 1000.0})
    assert_same(results(llm, repeating), results(engine(model), repeating))
    speculation = speculation_of(llm.engine)
    assert speculation.num_accepted > 40, "the drafts should repeat 7"
    assert_same(results(llm, KINDS["greedy"]), truths["greedy"])


@pytest.mark.parametrize("kind", ["greedy", "samples"])
@pytest.mark.parametrize("settings", ["roomy", "recompute", "swap"])
def test_a_model_that_drafts_for_itself_is_always_right(model, truths, kind, settings):
    """Its KV is right after forks, hits, preemption and swapping; otherwise its drafts would be rejected."""
    llm = engine(model, speculate=model, num_speculative_tokens=3, **ENGINES[settings])
    seen = Counter()
    llm.engine.events.subscribe(lambda event: seen.update([event.type]))
    for _ in range(2):  # in the second run, the prompts hit the prefix cache
        outputs = results(llm, KINDS[kind])
    if kind == "greedy":
        assert_same(outputs, truths[kind])
    assert settings == "roomy" or seen["preempted"]
    speculation = speculation_of(llm.engine)
    assert speculation.num_accepted > 0.98 * speculation.num_proposed > 50


def test_a_draft_model_that_is_often_wrong_changes_nothing(model, draft, truths):
    llm = engine(model, speculate=draft, **ENGINES["recompute"])
    assert_same(results(llm, KINDS["greedy"]), truths["greedy"])
    assert speculation_of(llm.engine).num_accepted < speculation_of(llm.engine).num_proposed
    once, again = (results(engine(model, speculate=draft), KINDS["samples"]) for _ in range(2))
    assert_same(once, again)


def test_drafts_that_cannot_be_are_refused(model, draft, tmp_path):
    other = str(save_llama(tmp_path / "other", vocab_size=VOCAB + 1, num_hidden_layers=1))
    short = str(save_llama(tmp_path / "short", max_position_embeddings=64, num_hidden_layers=1))
    with pytest.raises(InvalidConfig, match="vocabulary.*301 tokens and 300"):
        engine(model, speculate=other)
    with pytest.raises(InvalidConfig, match="supports at most 64 tokens; set max_model_len"):
        engine(model, speculate=short)
    assert engine(model, speculate=short, max_model_len=64).engine.max_model_len == 64
    for settings, words in (
        ({"speculate": ""}, "must be 'prompt-lookup' or name a draft model"),
        ({"speculate": 4}, "must be 'prompt-lookup' or name a draft model"),
        ({"num_speculative_tokens": 3}, "no effect without speculate"),
        ({"speculate": "prompt-lookup", "num_speculative_tokens": 0}, "at least 1"),
        ({"speculate": draft, "memory": "vattention", "block_size": None}, "maps the KV cache of one model"),
    ):
        with pytest.raises(InvalidConfig, match=words):
            engine(model, **settings)
