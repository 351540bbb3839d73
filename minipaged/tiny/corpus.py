"""Generates the training corpus of the embedded model from a seed: all text that it is ever trained on.

Three kinds of documents, mixed at random: stories (plain and as chat answers), questions and answers about
paging (``facts.txt``), and easy numbers and lists.  ``python -m minipaged.tiny.corpus`` prints some.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from .qa import AGAIN, ALIASES, DO_NOT_KNOW, OFF_TOPIC, OFF_TOPIC_SLOTS, Fact, load_facts
from .stories import GRAMMAR, NAMES, story

# The same strings are special tokens of the tokenizer.  EOT opens every document, so the next document's
# EOT also teaches the model to stop; END closes each message of a chat.
EOT, END, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [EOT, END, SYSTEM, USER, ASSISTANT]

Turn = tuple[str, str]

LISTS = {
    "colours": "red blue green yellow orange purple white black brown pink grey".split(),
    "fruits": "apples pears plums cherries bananas grapes oranges lemons peaches berries".split(),
    "animals": "cat dog horse cow fox bear rabbit owl mouse lion elephant goat duck".split(),
    "vegetables": "carrots potatoes onions tomatoes beans peas cabbage leeks".split(),
    "things in a kitchen": "spoon fork knife pot pan cup plate oven table".split(),
    "tools": "hammer saw drill spade rope nail ladder brush".split(),
    "trees": "oak birch pine beech ash maple willow".split(),
    "flowers": "rose tulip daisy lily violet poppy sunflower".split(),
    "musical instruments": "piano violin flute drum guitar trumpet harp".split(),
    "kinds of weather": "sun rain wind snow fog storm".split(),
    "parts of the body": "head hand foot arm leg nose ear mouth eye".split(),
    "clothes": "shirt coat hat scarf shoes gloves trousers socks".split(),
    "parts of an inference engine": [
        "scheduler",
        "block manager",
        "block table",
        "sampler",
        "attention kernel",
        "tokenizer",
    ],
    "ways to sample a token": ["greedy", "temperature", "top-k", "top-p", "min-p", "beam search"],
}
ORDERED = {
    "the days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "the months of the year": "January February March April May June July August September October November "
    "December".split(),
    "the four seasons": "spring summer autumn winter".split(),
    "the letters of the alphabet": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "the phases of a request": "waiting prefill decode finished".split(),
}
BEGINNINGS = [
    "Please tell me: ",
    "I have a question. ",
    "Quick question: ",
    "Hello! ",
    "One more thing. ",
    "Hi. ",
    "In simple words: ",
    "And another question: ",
    "Next question. ",
    "Thanks! ",
]
ENDS = [" Thank you.", " Please be brief.", " Explain it simply.", " I want to learn.", " In one sentence, please."]
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def sum_held_out(a: int, b: int) -> bool:
    """Whether a sum is held out: every tenth ordered pair of numbers is never shown in training."""
    return (7 * a + 3 * b) % 10 == 0


def _join(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def number_turn(rng: random.Random, held_out: bool = False) -> Turn:
    """Counting, sums, differences, comparisons and lists."""
    kinds = "count count down sum sum sum minus after compare list list order words repeat repeat repeat"
    kind = rng.choice(kinds.split())
    if kind in ("count", "down"):
        low = rng.choice([0, 1, 1, 1, rng.randint(2, 20), rng.randint(2, 80)])
        high = low + rng.randint(3, 14)
        numbers = list(range(low, high + 1))
        if kind == "down":
            numbers.reverse()
        first, last = numbers[0], numbers[-1]
        ways = [
            "Count from {} to {}.",
            "Please count from {} to {}.",
            "Can you count from {} to {}?",
            "Write the numbers from {} to {}.",
        ]
        if kind == "down":
            ways = ["Count down from {} to {}.", "Count backwards from {} to {}.", "Count from {} down to {}."]
        return rng.choice(ways).format(first, last), ", ".join(map(str, numbers)) + "."
    if kind == "sum":
        while True:
            a, b = rng.randint(0, 20), rng.randint(0, 20)
            if sum_held_out(a, b) == held_out:
                break
        if max(a, b, a + b) <= 12 and rng.random() < 0.25:
            wa, wb, wc = WORDS[a], WORDS[b], WORDS[a + b]
            return f"What is {wa} plus {wb}?", f"{wa.capitalize()} plus {wb} is {wc}."
        ways = [
            "What is {} plus {}?",
            "How much is {} plus {}?",
            "Add {} and {}.",
            "{} plus {}?",
            "Please add {} and {}.",
            "What is {} + {}?",
            "What is {}+{}?",
            "What is the sum of {} and {}?",
        ]
        return rng.choice(ways).format(a, b), f"{a} plus {b} is {a + b}."
    if kind == "minus":
        b = rng.randint(0, 12)
        a = b + rng.randint(0, 12)
        ways = ["What is {} minus {}?", "How much is {} minus {}?", "{} minus {}?", "What is {} - {}?"]
        return rng.choice(ways).format(a, b), f"{a} minus {b} is {a - b}."
    if kind == "after":
        a = rng.randint(0, 99)
        if rng.random() < 0.5:
            ask = rng.choice(["What comes after {}?", "Which number comes after {}?"])
            return ask.format(a), f"After {a} comes {a + 1}."
        return f"Which number comes before {a + 1}?", f"Before {a + 1} comes {a}."
    if kind == "compare":
        a, b = rng.sample(range(0, 60), 2)
        if rng.random() < 0.5:
            return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."
        return f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."
    if kind == "list":
        name, items = rng.choice(list(LISTS.items()))
        n = rng.randint(2, 5)
        chosen = rng.sample(items, n)
        if rng.random() < 0.5:
            ask = rng.choice(["Name {} {}.", "Tell me {} {}.", "Can you name {} {}?", "What are {} {}?"])
            return ask.format(WORDS[n], name), _sentence(_join(chosen))
        ask = rng.choice(["List {} {}.", "Make a list of {} {}.", "Write a list of {} {}.", "Please list {} {}."])
        return ask.format(WORDS[n], name), "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1))
    if kind == "order":
        name, items = rng.choice(list(ORDERED.items()))
        ask = rng.choice(["What are {}?", "Name {}.", "List {}.", "Tell me {}."]).format(name)
        return ask, _sentence(", ".join(items))
    if kind == "repeat":
        # To keep a hero's name the same throughout a story the model must copy it, so copying is trained separately.
        pool = [*NAMES["he"], *NAMES["she"], *GRAMMAR.words["animals"], *GRAMMAR.words["thing"]]
        words = " ".join(rng.sample(pool, rng.randint(2, 12)))
        return rng.choice(["Repeat: {}", "Repeat after me: {}", "Say this again: {}", "Echo {}"]).format(words), words
    n = rng.randint(2, 12)
    return f"Count to {WORDS[n]} in words.", _sentence(", ".join(WORDS[1 : n + 1]))


def question_turn(rng: random.Random, fact: Fact, held_out: bool = False) -> Turn:
    """Ask for one fact, in the held-out phrasing only if ``held_out``."""
    question = fact.held_out if held_out else rough(rng, rng.choice(fact.phrasings))
    return question, rng.choice(fact.answers)


def rough(rng: random.Random, question: str) -> str:
    """Varies a question as users type it: other spellings, no capitals, no final mark, a polite beginning or end."""
    for name, others in ALIASES.items():
        if name in question and rng.random() < 0.3:
            question = question.replace(name, rng.choice(others))
    roll = rng.random()
    if roll < 0.1:
        return question[0].lower() + question[1:].rstrip("?.")
    if roll < 0.15:
        return question.lower()
    if roll < 0.2:
        return question.rstrip("?.")
    if roll < 0.28:
        return rng.choice(BEGINNINGS) + question
    if roll < 0.32:
        return question + rng.choice(ENDS)
    if roll < 0.5:
        return question.replace("What is the difference", "Difference")
    return question


def unknown_turn(rng: random.Random) -> Turn:
    """A question the model should politely decline."""
    slots = {key: rng.choice(values) for key, values in OFF_TOPIC_SLOTS.items()}
    return rough(rng, rng.choice(OFF_TOPIC).format_map(slots)), rng.choice(DO_NOT_KNOW)


def story_turns(rng: random.Random) -> list[Turn]:
    """A request for a story, sometimes with a question about it."""
    tale = story(rng)
    turns = [(rough(rng, tale.request), tale.text)]
    if rng.random() < 0.5:
        ask = rng.choice(["Who was the story about?", "Who was that about?", "What was the hero's name?"])
        turns.append((ask, f"It was about {tale.about}."))
    return turns


def system_prompt(rng: random.Random) -> str:
    """One of many system prompts; engines can share their blocks between requests."""
    parts = [
        ["You are the tiny model of minipaged.", "You are a helpful assistant.", "You are a small and friendly model."],
        [
            "You answer questions about paging and KV caches.",
            "You know a little about paged attention.",
            "You explain how an inference engine works.",
        ],
        ["Answer in one or two short sentences.", "Keep your answers short and clear.", "Be brief and kind."],
        [
            "You can also tell short stories and do easy sums.",
            "When somebody wants a story, tell one.",
            "If you do not know something, say so.",
        ],
    ]
    return " ".join(rng.choice(part) for part in parts[: rng.randint(1, 4)])


def render_chat(turns: list[Turn], system: str = "") -> str:
    """The chat as one text, exactly as the chat template writes it (minus the leading EOT)."""
    head = f"{SYSTEM}{system}{END}" if system else ""
    return head + "".join(f"{USER}{q}{END}{ASSISTANT}{a}{END}" for q, a in turns)


def chat(rng: random.Random, facts: list[Fact], held_out: bool = False, stories: bool = True) -> str:
    """One conversation of one to five turns, mostly about paging."""
    turns: list[Turn] = []
    wanted = rng.choice([1, 1, 1, 1, 2, 2, 3, 4, 5])
    while len(turns) < wanted:
        roll = rng.random()
        if roll < 0.82:
            fact = rng.choice(facts)
            question, answer = question_turn(rng, fact, held_out)
            turns.append((question, answer))
            if len(fact.answers) > 1 and rng.random() < 0.2:
                other = rng.choice([a for a in fact.answers if a != answer])
                turns.append((rng.choice(AGAIN), other))
        elif roll < 0.89:
            turns.append(unknown_turn(rng))
        elif roll < 0.95 or not stories:
            turns.append(number_turn(rng, held_out))
        else:
            turns.extend(story_turns(rng))
    return render_chat(turns, system_prompt(rng) if rng.random() < 0.12 else "")


def notes(rng: random.Random, facts: list[Fact]) -> str:
    """A page of plain text about paging, so that the model continues a plain prompt such as "The KV cache" well."""
    terms = [fact for fact in facts if fact.kind in ("term", "terms")]
    return " ".join(rng.choice(fact.answers) for fact in rng.sample(terms, rng.randint(2, 5)))


def kind_of_document(rng: random.Random) -> str:
    """The mixture, by number of documents (stories are the longest, so by tokens they are about 45 %)."""
    return rng.choices(["story", "story chat", "chat", "numbers", "notes"], [20, 15, 35, 27, 3])[0]


def document(rng: random.Random, facts: list[Fact], kind: str = "", held_out: bool = False) -> str:
    """One document of the given kind (a random one by default), without its leading EOT."""
    kind = kind or kind_of_document(rng)
    if kind == "story":
        return story(rng).text
    if kind == "story chat":
        turns = story_turns(rng)
        if rng.random() < 0.2:
            ask = rng.choice(["Another one, please.", "One more story, please.", "And another story?"])
            turns.append((ask, story(rng).text))
        return render_chat(turns, system_prompt(rng) if rng.random() < 0.1 else "")
    if kind == "numbers":
        turns = [number_turn(rng, held_out) for _ in range(rng.choice([1, 1, 2, 3]))]
        return render_chat([(q if held_out else rough(rng, q), a) for q, a in turns])
    if kind == "notes":
        return notes(rng, facts)
    return chat(rng, facts, held_out)


def documents(seed: int | str) -> Iterator[str]:
    """An endless stream of training documents; the same seed gives the same stream."""
    rng, facts = random.Random(seed), load_facts()
    while True:
        yield document(rng, facts)


def held_out_documents(kind: str, count: int, seed: int = 10_007) -> list[str]:
    """Documents for evaluation: another seed, held-out phrasings, held-out sums."""
    rng, facts = random.Random(seed), load_facts()
    return [document(rng, facts, kind, held_out=True) for _ in range(count)]


def main() -> None:
    """Print a few documents."""
    for text in islice(documents(seed=0), 20):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
