"""The committed model is small, loads, and reaches the accuracy that its README states."""

import json
import re

import pytest
import torch

from minipaged.tiny import WEIGHTS
from minipaged.tiny.corpus import SPECIAL_TOKENS
from minipaged.tiny.evaluate import chat_prompt, content_words, generate, keyword_score, load
from minipaged.tiny.qa import load_facts


@pytest.fixture(scope="module")
def tiny():
    return load()


def test_size(tiny):
    model, tokenizer = tiny
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 12_000_000
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    assert len(tokenizer) <= 4096
    assert model.config.max_position_embeddings >= 512
    assert model.config.vocab_size == len(tokenizer)


def test_configuration_names_rope_and_both_end_tokens():
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "bfloat16"
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert json.loads((WEIGHTS / "generation_config.json").read_text())["eos_token_id"] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        "naïve café, 東京, Привет, 🦊🤖",
        "tabs\tand\n\nlines  and   spaces ",
        "",
        " x",
        "\x00\x7f",
        "def f(x):\n    return x ** 2  # 0xFF",
    ],
)
def test_any_text_survives_the_tokenizer(tiny, text):
    _, tokenizer = tiny
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id, "plain text starts like a training document"
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template(tiny):
    _, tokenizer = tiny
    text = chat_prompt(tokenizer, "Hello", "Hi!", "Bye", system="Be brief.")
    assert text == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|>"
        "<|user|>Bye<|end|><|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[:2] == [0, 2] and ids[-1] == 4
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def share_of_right_answers(tiny, facts, questions) -> float:
    model, tokenizer = tiny
    replies = generate(model, tokenizer, [chat_prompt(tokenizer, question) for question in questions])
    assert all(ended for _, ended in replies)
    answers = [(reply, fact.answers) for (reply, _), fact in zip(replies, facts, strict=True)]
    return sum(keyword_score(*answer) >= 0.6 for answer in answers) / len(facts)


def test_it_answers_its_own_questions(tiny):
    facts = load_facts()[::8]
    assert share_of_right_answers(tiny, facts, [fact.phrasings[0] for fact in facts]) >= 0.9


def test_it_understands_phrasings_it_has_never_seen(tiny):
    facts = load_facts()[::8]
    assert share_of_right_answers(tiny, facts, [fact.held_out for fact in facts]) >= 0.85


def test_the_readme_states_what_was_measured():
    folder = WEIGHTS.parent
    measured = json.loads((folder / "evaluation.json").read_text())
    readme = (folder / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", readme, re.M))
    facts = {
        name: measured[f"facts_{name}"] for name in ("seen_phrasing", "held_out_phrasing", "another_writers_phrasing")
    }
    stories = measured["stories_at_0.8"]

    def percent(share: float) -> str:
        return f"{100 * share:.0f} %"

    assert rows["facts, first phrasing (seen in training)"] == percent(facts["seen_phrasing"]["keywords"])
    assert rows["facts, held-out phrasing"] == percent(facts["held_out_phrasing"]["keywords"])
    assert rows["facts, as another writer asks"] == percent(facts["another_writers_phrasing"]["keywords"])
    assert rows["sums up to 40, pairs seen in training"] == percent(measured["sums_seen"])
    assert rows["sums, held-out pairs"] == percent(measured["sums_held_out"])
    assert rows["counting up and down"] == percent(measured["counting"])
    assert rows["stories at temperature 0.8 that end within 300 tokens"] == percent(stories["end_within_300_tokens"])
    assert rows["stories with exactly two names from beginning to end"] == percent(stories["same_two_names_throughout"])
    assert rows["words in 100 stories that training never uses"] == str(len(stories["made_up_words"]))


def test_it_counts_and_adds(tiny):
    model, tokenizer = tiny
    questions = ["Count from 3 to 12.", "What is 7 plus 5?", "What are the days of the week?"]
    replies = generate(model, tokenizer, [chat_prompt(tokenizer, question) for question in questions])
    count, total, days = (reply for reply, _ in replies)
    assert count == "3, 4, 5, 6, 7, 8, 9, 10, 11, 12."
    assert total == "7 plus 5 is 12."
    assert "tuesday" in content_words(days) and "sunday" in content_words(days)


def test_stories_end_and_differ(tiny):
    model, tokenizer = tiny
    prompts = ["Once upon a time", "The robot opened the door", chat_prompt(tokenizer, "Tell me a story.")]
    stories = generate(model, tokenizer, prompts * 3, 300, temperature=0.8, seed=5)
    assert sum(ended for _, ended in stories) >= 8
    assert len({text for text, _ in stories}) == 9
    assert min(len(text.split()) for text, _ in stories) > 40


def test_weights_are_finite(tiny):
    model, _ = tiny
    assert all(torch.isfinite(p).all() for p in model.parameters())
