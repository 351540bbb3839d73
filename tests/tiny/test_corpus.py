"""The generated corpus is deterministic, complete, and without leaks of held-out documents."""

from itertools import islice

from minipaged.tiny.corpus import ASSISTANT, USER, documents, held_out_documents, number_turn, sum_held_out
from minipaged.tiny.qa import load_facts
from minipaged.tiny.stories import GRAMMAR, NAMES, story


def sample(seed: int, count: int) -> list[str]:
    return list(islice(documents(seed), count))


def test_the_same_seed_gives_the_same_corpus():
    assert sample(3, 200) == sample(3, 200)
    assert sample(3, 200) != sample(4, 200)


def test_all_kinds_of_documents_appear():
    texts = sample(0, 400)
    assert any(not t.startswith("<|") and "The end." in t for t in texts), "plain stories"
    assert any("block" in t and t.startswith(USER) for t in texts), "questions about paging"
    assert any(" plus " in t for t in texts) and any("1, 2, 3, 4" in t for t in texts), "numbers"
    assert any("Tell me a story" in t and ASSISTANT in t for t in texts), "stories as answers"
    assert any(t.count(USER) > 2 for t in texts), "chats of several turns"


def test_there_are_enough_facts_with_several_phrasings_each():
    facts = load_facts()
    assert len(facts) >= 200
    assert all(len(fact.phrasings) >= 3 and fact.answers for fact in facts)
    assert sum(len(fact.phrasings) >= 4 for fact in facts) > 0.7 * len(facts)
    assert sum(len(fact.phrasings) for fact in facts) > 1000


def test_no_question_has_two_meanings():
    owner: dict[str, int] = {}
    for number, fact in enumerate(load_facts()):
        for question in [*fact.phrasings, fact.held_out]:
            assert owner.setdefault(question.lower(), number) == number, question


def test_held_out_phrasings_are_never_shown_in_training():
    def questions(text: str) -> list[str]:
        return [part.split("<|end|>")[0].lower().rstrip("?.") for part in text.split(USER)[1:]]

    seen = {question for text in sample(1, 6000) for question in questions(text)}
    # A phrasing also counts as leaked if it follows an introduction ("Quick question: ...").
    held_out = [fact.held_out.lower().rstrip("?.") for fact in load_facts()]
    leaked = [h for h in held_out if any(s == h or s.endswith((": " + h, ". " + h, "! " + h)) for s in seen)]
    assert leaked == []
    assert any(held_out[0] in text.lower() for text in held_out_documents("chat", 400))


def test_held_out_sums_are_never_shown_in_training():
    import random
    import re

    rng = random.Random(0)
    for held_out in (False, True):
        for question, answer in (number_turn(rng, held_out) for _ in range(2000)):
            match = re.fullmatch(r"(\d+) plus (\d+) is (\d+)\.", answer)
            if match:
                a, b, c = map(int, match.groups())
                assert a + b == c and sum_held_out(a, b) == held_out, question


def test_stories_keep_their_cast_and_fill_every_slot():
    import random
    import re

    rng = random.Random(0)
    names = set(NAMES["he"]) | set(NAMES["she"])
    texts = [story(rng) for _ in range(500)]
    assert len({tale.text for tale in texts}) == 500
    for tale in texts:
        assert "{" not in tale.text + tale.request and "@" not in tale.text
        cast = names & set(re.findall(r"[A-Z][a-z]+", tale.text))
        assert len(cast) == 2 and tale.about.split(",")[0] in cast
        assert not re.search(r"\b[Aa] [aeiou]", tale.text)
        assert 70 <= len(tale.text.split()) <= 190
    assert len(GRAMMAR.plots) >= 15
