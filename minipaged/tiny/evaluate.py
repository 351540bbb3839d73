"""Evaluates the embedded model: answers to its own questions, endings of its stories, sums and counting.

    python -m minipaged.tiny.evaluate             # prints the numbers and writes evaluation.json
    python -m minipaged.tiny.evaluate --samples   # prints the ten samples of the README

Uses ``transformers`` for generation on purpose, so that the result depends on the model and not on minipaged's
own engine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import WEIGHTS
from .corpus import END, documents, number_turn
from .qa import OFF_TOPIC, OFF_TOPIC_SLOTS, Fact, load_facts
from .stories import NAMES
from .train import held_out_batches, held_out_loss

COMMON = set(
    "a an the is are was of in to and or it its that this for with by on at as be not no so than "
    "only one all each from has have can may then they their you i".split()
)
PLAIN_STARTS = [
    "Once upon a time",
    "The robot opened the door and",
    "In a small town by the sea",
    "Long ago",
    "There was once a",
]
STORY_REQUESTS = [
    "Tell me a story.",
    "Tell me a story about a fox.",
    "Tell me a story about a robot.",
    "Tell me a story about a library.",
    "Can you tell me a story about a brave mouse?",
]


def load(path: Path = WEIGHTS) -> tuple:
    """Model (in float32, which is faster than bfloat16 on most CPUs) and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokenizer


def chat_prompt(tokenizer, *messages: str, system: str = "") -> str:
    """User and assistant messages in turn, in the format that the model was trained on."""
    roles = [{"role": "user" if i % 2 == 0 else "assistant", "content": m} for i, m in enumerate(messages)]
    first = [{"role": "system", "content": system}] if system else []
    return tokenizer.apply_chat_template(first + roles, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def generate(
    model, tokenizer, prompts: list[str], max_new: int = 100, temperature: float = 0.0, seed: int = 0
) -> list[tuple[str, bool]]:
    """Continue every prompt; returns (text, whether it ended with an end token).  Temperature 0 is greedy.

    A prompt that is plain text gets the leading end-of-text token; a rendered chat has it already.
    """
    torch.manual_seed(seed)
    results = []
    for i in range(0, len(prompts), 32):
        bos = tokenizer.bos_token
        texts = [p if p.startswith(bos) else bos + p for p in prompts[i : i + 32]]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        sampling: dict = dict(do_sample=False, temperature=None)
        if temperature:
            sampling = dict(do_sample=True, temperature=temperature, top_k=0)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new, **sampling
        )
        ends = {tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(END)}
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            stop = next((k for k, token in enumerate(row) if token in ends), len(row))
            results.append((tokenizer.decode(row[:stop]), stop < len(row)))
    return results


def content_words(text: str) -> set[str]:
    """The words of a text that carry meaning."""
    return set(re.findall(r"[a-z0-9-]+", text.lower())) - COMMON


def keyword_score(reply: str, answers: list[str]) -> float:
    """Share of the content words of the best-matching answer that the reply contains."""
    found = content_words(reply)
    return max(len(content_words(a) & found) / len(content_words(a)) for a in answers)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, possessives and contractions whole."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def word_list() -> set[str]:
    """Every word that the training documents use: what a story has beyond them, the model has made up."""
    return {word for text in islice(documents(0), 20_000) for word in words_of(text)}


def rate(flags: list[bool]) -> float:
    """Share of true values, rounded."""
    return round(sum(flags) / len(flags), 3)


def unseen_questions(facts: list[Fact]) -> list[tuple[str, Fact]]:
    """The questions of ``unseen.txt``, without those that training happens to ask as well."""

    def plain(question: str) -> str:
        return question.lower().rstrip("?.! ")

    lines = (Path(__file__).parent / "unseen.txt").read_text(encoding="utf-8").splitlines()
    questions = [line for line in lines if not line.startswith("#")]
    taught = {plain(phrasing) for fact in facts for phrasing in fact.phrasings}
    return [(q, fact) for q, fact in zip(questions, facts, strict=True) if plain(q) not in taught]


def evaluate(path: Path = WEIGHTS) -> dict:
    """All numbers of the README."""
    model, tokenizer = load(path)
    facts = load_facts()
    report: dict = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "held_out_loss": held_out_loss(model, held_out_batches(tokenizer, 6)),
    }
    model.eval()

    for name, asked in (
        ("seen_phrasing", [(f.phrasings[0], f) for f in facts]),
        ("held_out_phrasing", [(f.held_out, f) for f in facts]),
        ("another_writers_phrasing", unseen_questions(facts)),
    ):
        replies = generate(model, tokenizer, [chat_prompt(tokenizer, question) for question, _ in asked])
        answered = [(reply, fact.answers) for (reply, _), (_, fact) in zip(replies, asked, strict=True)]
        report[f"facts_{name}"] = {
            "questions": len(asked),
            "exact": rate([reply in answers for reply, answers in answered]),
            "keywords": rate([keyword_score(reply, answers) >= 0.6 for reply, answers in answered]),
        }

    rng = random.Random(3)
    for name, held_out in (("sums_seen", False), ("sums_held_out", True)):
        pairs = dict(number_turn(rng, held_out) for _ in range(1500))
        pairs = {q: a for q, a in pairs.items() if " plus " in a and a[0].isdigit()}
        questions = sorted(pairs)[:60]
        replies = generate(model, tokenizer, [chat_prompt(tokenizer, q) for q in questions], 40)
        report[name] = rate([r == pairs[q] for (r, _), q in zip(replies, questions, strict=True)])
    pairs = dict(number_turn(rng) for _ in range(1500))
    pairs = {q: a for q, a in pairs.items() if "ount" in q and a[0].isdigit()}
    questions = sorted(pairs)[:: max(1, len(pairs) // 60)][:60]
    replies = generate(model, tokenizer, [chat_prompt(tokenizer, q) for q in questions], 100)
    report["counting"] = rate([r == pairs[q] for (r, _), q in zip(replies, questions, strict=True)])

    unknown = [q.format_map({k: v[0] for k, v in OFF_TOPIC_SLOTS.items()}) for q in OFF_TOPIC]
    replies = generate(model, tokenizer, [chat_prompt(tokenizer, q) for q in unknown], 60)
    report["declines_off_topic"] = rate(["know" in r for r, _ in replies])

    starts = [s for s in PLAIN_STARTS for _ in range(10)]
    starts += [chat_prompt(tokenizer, s) for s in STORY_REQUESTS for _ in range(10)]
    stories = generate(model, tokenizer, starts, 300, temperature=0.8, seed=1)
    names = {name for side in NAMES.values() for name in side}
    known = word_list()
    casts = [len(names & set(re.findall(r"[A-Z][a-z]+", text))) for text, _ in stories]
    report["stories_at_0.8"] = {
        "samples": len(stories),
        "end_within_300_tokens": rate([ended for _, ended in stories]),
        "distinct": len({text for text, _ in stories}),
        "same_two_names_throughout": rate([cast == 2 for cast in casts]),
        "made_up_words": sorted(word for text, _ in stories for word in words_of(text) if word not in known),
        "mean_words": round(sum(len(text.split()) for text, _ in stories) / len(stories)),
    }
    return report


# (messages or a plain prompt, temperature, seed)
SAMPLES: list[tuple[list[str] | str, float, int]] = [
    (["What is a block table?"], 0.0, 0),
    (["How does copy on write work?"], 0.0, 0),
    (["Why is decode slow?"], 0.0, 0),
    (
        [
            "What happens when memory runs out?",
            "The scheduler preempts the newest running request and takes its blocks. That request continues later.",
            "Should I recompute or swap?",
        ],
        0.0,
        0,
    ),
    (["What is 7 plus 5?"], 0.0, 0),
    (["Count from 3 to 12."], 0.0, 0),
    (["What is the capital of France?"], 0.0, 0),
    (["Tell me a story about a fox."], 0.8, 1),
    ("Once upon a time", 0.8, 2),
    ("The robot opened the door and", 0.8, 3),
]


def print_samples(path: Path = WEIGHTS) -> None:
    """The samples of the README, verbatim."""
    model, tokenizer = load(path)
    for number, (prompt, temperature, seed) in enumerate(SAMPLES, 1):
        text = prompt if isinstance(prompt, str) else chat_prompt(tokenizer, *prompt)
        reply, _ = generate(model, tokenizer, [text], 300, temperature, seed)[0]
        how = f"temperature {temperature}, seed {seed}" if temperature else "greedy"
        if isinstance(prompt, str):
            lines = [f"**{prompt}**{reply}"]
        else:
            lines = [f"**{'User' if i % 2 == 0 else 'Model'}:** {m}" for i, m in enumerate([*prompt, reply])]
        quoted = "\n\n".join(lines).replace("\n", "\n   > ")
        print(f"{number}. ({how})\n\n   > {quoted}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m minipaged.tiny.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent / "evaluation.json")
    args = parser.parse_args()
    if args.samples:
        return print_samples(args.weights)
    report = evaluate(args.weights)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
