"""Short stories from a grammar, which is in ``stories.txt``.

A story is a list of *beats*.  Every beat has several wordings, and all of them draw on one set of slots
(hero, friend, place, thing, ...) that is filled once per story.  That is why names and pronouns stay
consistent while two stories are hardly ever the same.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import NamedTuple

PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


class Plot(NamedTuple):
    """What happens: the beats in order, what a request may call it, and the morals that fit."""

    topic: str
    morals: list[str]
    beats: list[list[str]]


class Grammar(NamedTuple):
    """Everything in ``stories.txt``."""

    plots: list[Plot]
    beats: dict[str, list[str]]
    words: dict[str, list[str]]


class Story(NamedTuple):
    """A story, a request that it answers, and who it is about."""

    request: str
    text: str
    about: str


def read_grammar(path: Path | None = None) -> Grammar:
    """Read the sections of the grammar; the format is explained at the top of the file."""
    text = (path or Path(__file__).with_name("stories.txt")).read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    grammar = Grammar([], {}, {})
    for section in text.split("== ")[1:]:
        head, _, body = section.partition("\n")
        kind, _, name = head.partition(": ")
        if kind == "words":
            grammar.words[name] = [word.strip() for word in body.replace("\n", " ").split("|")]
            continue
        paragraphs = [p.splitlines() for p in re.split(r"\n\n+", body.strip())]
        if kind == "plot":
            fields = dict(line.split(": ", 1) for line in paragraphs[0])
            # "@meet" and the like name a beat that several plots use.
            beats = [grammar.beats[p[0][1:]] if p[0].startswith("@") else p for p in paragraphs[1:]]
            grammar.plots.append(Plot(fields["topic"], fields["morals"].split(" | "), beats))
        else:
            grammar.beats[head] = paragraphs[0]
    return grammar


GRAMMAR = read_grammar()
NAMES = {pronoun: GRAMMAR.words[f"{pronoun} names"] for pronoun in PRONOUNS}


def article(noun: str) -> str:
    """'fox' -> 'a fox', 'owl' -> 'an owl'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def character(rng: random.Random) -> tuple[str, str, str]:
    """A kind, a name and a pronoun that go together."""
    words = GRAMMAR.words
    groups = [words["animals"], words["animals"], words["men"], words["women"], words["wonders"]]
    kind = rng.choice(rng.choice(groups))
    only = {"he": [*words["men"], "snowman", "wizard"], "she": [*words["women"], "hen", "cow"]}
    pronoun = rng.choice([p for p in PRONOUNS if kind in only[p]] or list(PRONOUNS))
    return kind, rng.choice(NAMES[pronoun]), pronoun


def story(rng: random.Random) -> Story:
    """Invent one story."""
    words = GRAMMAR.words
    plot = rng.choice(GRAMMAR.plots)
    kind, name, pronoun = character(rng)
    fkind, friend, fpronoun = character(rng)
    while friend == name or fkind == kind:
        fkind, friend, fpronoun = character(rng)
    he, him, his = PRONOUNS[pronoun]
    fhe, fhim, fhis = PRONOUNS[fpronoun]
    spot, spot2, spot3 = rng.sample(words["spot"], 3)
    # "Old" is a trait already: "a young old man" would be odd.
    trait, ftrait = (
        "kind" if who.startswith("old") else word
        for who, word in zip((kind, fkind), rng.sample(words["trait"], 2), strict=True)
    )
    time, home = rng.choice(words["time"]), rng.choice(words["home"])
    slots = dict(
        kind=kind,
        name=name,
        he=he,
        him=him,
        his=his,
        He=he.capitalize(),
        His=his.capitalize(),
        trait=trait,
        fkind=fkind,
        friend=friend,
        fhe=fhe,
        fhim=fhim,
        fhis=fhis,
        FHe=fhe.capitalize(),
        ftrait=ftrait,
        time=time,
        timel=time[0].lower() + time[1:],
        home=home,
        Home=home[0].upper() + home[1:],
        spot=spot,
        spot2=spot2,
        spot3=spot3,
        a_kind=article(kind),
        a_fkind=article(fkind),
    )
    for slot in "place thing food dish build fear wish fruit skill saw stepped".split():
        slots[slot] = rng.choice(words[slot])
    slots["moral"] = rng.choice(plot.morals)
    slots["n"] = rng.choice("four five six seven eight nine ten".split())
    slots["topic"] = plot.topic.format_map(slots)
    opening = GRAMMAR.beats["sudden opening" if rng.random() < 0.3 else "opening"]
    sentences = [rng.choice(wordings) for wordings in [opening, *plot.beats, GRAMMAR.beats["ending"]]]
    # A paragraph break or two makes the page easier to read.
    breaks = {1, len(sentences) - 2} if rng.random() < 0.4 else set()
    text = "".join(("" if i == 0 else "\n" if i in breaks else " ") + s for i, s in enumerate(sentences))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.format_map(slots))
    request = rng.choice(GRAMMAR.beats["request"]).format_map(slots)
    return Story(request, text, f"{name}, {article(kind)}")
