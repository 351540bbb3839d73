"""Questions and answers: reads ``facts.txt`` and gives every fact its phrasings.

Phrasings of each fact are *held out*: they are never shown in training, so asking them measures whether the
model has learnt the fact or only the sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ONE = [
    "What is {t}?",
    "Explain {t}.",
    "What does {b} mean?",
    "Tell me about {t}.",
    "Can you explain {t}?",
    "Define {b}.",
    "What do you know about {t}?",
    "I do not understand {t}. What is it?",
    "Please describe {t} in a few words.",
    "What exactly is {t}?",
    "How does {t} work?",
    "{B}?",
    "What's {t}?",
    "Give me a definition of {t}.",
    "Do you know what {t} is?",
    "Could you tell me what {t} is?",
    "Tell me what {t} is.",
    "What is meant by {b}?",
    "Describe {t}.",
    "What is {t} for?",
    "I want to know what {t} is.",
    "Explain {b} to a beginner.",
    "What is the meaning of {b}?",
    "{B}, what is that?",
    "Give a short explanation of {t}.",
    "I keep reading about {t}. What is it?",
    "How would you describe {t}?",
    "Help me understand {t}.",
    "What should I know about {t}?",
    "I have never heard of {t}.",
]
MANY = [
    "What are {t}?",
    "Explain {t}.",
    "What does {t} mean?",
    "Tell me about {t}.",
    "Can you explain {t}?",
    "Define {t}.",
    "What do you know about {t}?",
    "I do not understand {t}. What are they?",
    "Please describe {t} in a few words.",
    "What exactly are {t}?",
    "How do {t} work?",
    "{B}?",
    "Give me a definition of {t}.",
    "Do you know what {t} are?",
    "Could you tell me what {t} are?",
    "Tell me what {t} are.",
    "What is meant by {t}?",
    "Describe {t}.",
    "What are {t} for?",
    "I want to know what {t} are.",
    "Explain {t} to a beginner.",
    "What is the meaning of {t}?",
    "{B}, what are they?",
    "Give a short explanation of {t}.",
    "I keep reading about {t}. What are they?",
    "How would you describe {t}?",
    "Help me understand {t}.",
    "What should I know about {t}?",
    "I have never heard of {t}.",
]
# The held-out template of a term is one of those after the first, which is the most natural one: to hold that out
# would only make the model worse.
HELD_OUT = slice(1, 15)
# Other spellings of the same thing.  Questions use them now and then, answers never.
ALIASES = {
    "copy on write": ["copy-on-write", "COW"],
    "PagedAttention": ["paged attention", "Paged Attention"],
    "the KV cache": ["a KV cache", "the key value cache", "KV caching"],
    "grouped query attention": ["grouped-query attention", "GQA"],
    "multi query attention": ["MQA"],
    "byte pair encoding": ["BPE"],
    "LRU": ["least recently used", "LRU eviction"],
    "TTFT": ["time to first token", "the time to first token"],
    "FCFS": ["first come, first served"],
    "all or nothing eviction": ["all-or-nothing eviction"],
    "head of line blocking": ["head-of-line blocking"],
    "iteration level scheduling": ["iteration-level scheduling"],
    "prefix caching": ["prefix cache reuse"],
    "inter token latency": ["inter-token latency", "time per output token"],
    "the TLB": ["a TLB", "TLB"],
    "RoPE": ["rotary position embedding", "rope"],
    "a CUDA graph": ["CUDA graphs"],
    "memory fragmentation": ["fragmentation"],
    "self attention": ["self-attention"],
    "top-k sampling": ["top-k"],
    "top-p sampling": ["top-p", "nucleus sampling"],
    "min-p sampling": ["min-p"],
    "a sliding window": ["sliding window attention"],
    "bfloat16": ["bf16"],
    "split KV": ["split-KV", "flash decoding"],
    "recomputation": ["recompute"],
    "swapping": ["swap"],
}


class Fact(NamedTuple):
    """One thing to know: the phrasings to train on, the one held out, and the answers."""

    kind: str
    phrasings: list[str]
    held_out: str
    answers: list[str]


def _bare(term: str) -> str:
    """'a block table' -> 'block table'; names without an article stay as they are."""
    first, _, rest = term.partition(" ")
    return rest if first in ("a", "an", "the") else term


def load_facts(path: Path | None = None) -> list[Fact]:
    """All facts of the file, in order."""
    path = path or Path(__file__).with_name("facts.txt")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    facts = []
    for number, paragraph in enumerate(p for p in "\n".join(lines).split("\n\n") if p.strip()):
        fields: dict[str, list[str]] = {}
        for line in paragraph.strip().splitlines():
            kind, _, text = line.partition(": ")
            fields.setdefault(kind, []).append(text.strip())
        if "q" in fields:
            phrasings = [phrasing.strip() for line in fields["q"] for phrasing in line.split("|")]
            (held_out,) = fields["h"]
            facts.append(Fact("q", phrasings, held_out, fields["a"]))
            continue
        kind = "term" if "term" in fields else "terms"
        (text,) = fields[kind]
        bare = _bare(text)
        slots = {"t": text, "b": bare, "B": bare[0].upper() + bare[1:]}
        phrasings = [p.format_map(slots) for p in (ONE if kind == "term" else MANY)]
        candidates = phrasings[HELD_OUT]
        held_out = candidates[number % len(candidates)]
        phrasings.remove(held_out)
        facts.append(Fact(kind, phrasings, held_out, fields["a"]))
    return facts


# Questions the model should not try to answer.  The {x} slots are filled from OFF_TOPIC_SLOTS below.
OFF_TOPIC = [
    "Who is the president of {country}?",
    "What is the capital of {country}?",
    "Who won the football match?",
    "What is the weather in {country}?",
    "How do I cook {food}?",
    "What time is it?",
    "What day is it today?",
    "Write a program in Java.",
    "What is the meaning of life?",
    "Who wrote {book}?",
    "Translate this to French.",
    "How far away is {planet}?",
    "What is the price of gold?",
    "Can you book a flight to {country}?",
    "How old is the king of {country}?",
    "What is the best film?",
    "How do I repair a {machine}?",
    "Who discovered {planet}?",
    "What is the population of {country}?",
    "Recommend a doctor.",
    "What should I eat today?",
    "How do I learn to play the {instrument}?",
    "What is quantum physics?",
    "Give me tips to buy a {machine}.",
    "Which language do people speak in {country}?",
    "Is {planet} a star?",
    "What is the news today?",
    "How many people live in {country}?",
    "Where can I buy a {machine}?",
    "Prove a hard theorem.",
    "How long does it take to bake {food}?",
    "When was {country} founded?",
    "Why is the sky blue?",
    "How do birds fly?",
    "What is love?",
    "Why do cats sleep so much?",
    "Who was Napoleon?",
    "What is the largest ocean?",
    "How do I lose weight?",
    "Can you draw a picture?",
    "Do you know my name?",
    "What is photosynthesis?",
    "How does a {machine} work?",
    "What is a good name for a dog?",
    "Sing a song.",
    "How tall is the Eiffel Tower?",
    "Is it going to rain?",
    "Who invented the {machine}?",
    "What is the speed of light?",
    "How old are you?",
]
OFF_TOPIC_SLOTS = {
    "country": [
        "France",
        "Japan",
        "Brazil",
        "Kenya",
        "Canada",
        "India",
        "Spain",
        "Norway",
        "Egypt",
        "Peru",
        "Germany",
        "China",
        "Italy",
        "Mexico",
        "Australia",
        "Poland",
    ],
    "food": ["pasta", "rice", "bread", "fish", "a cake", "pizza", "potatoes", "beans", "an egg"],
    "book": ["Hamlet", "this book", "Don Quixote", "the Odyssey", "Faust", "War and Peace", "Robinson Crusoe"],
    "planet": ["Mars", "Venus", "Jupiter", "Saturn", "Neptune", "the Moon", "the Sun"],
    "machine": ["bicycle", "car", "washing machine", "radio", "phone", "clock", "boat", "computer"],
    "instrument": ["piano", "violin", "guitar", "drums", "flute"],
}
DO_NOT_KNOW = [
    "I do not know that. I only know about paging, stories and easy numbers.",
    "I am sorry, I do not know. I am a very small model. Ask me about KV caches or for a story.",
    "That is outside what I know. I can talk about paging, tell a story, or count.",
]
AGAIN = [
    "Can you say that in other words?",
    "Please say it differently.",
    "In other words?",
    "I did not get it. Once more, please.",
    "Could you explain that again?",
]
