"""Predict, then run: quiz questions that the engine's own next step answers.

A step is computed but not shown yet. The question is made from the state before the step, and its answer is taken from
the step's events. The code does not know what a scenario will do: a question that fits no step is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from minipaged.events import (
    Admitted,
    Allocated,
    Copied,
    Event,
    Evicted,
    Finished,
    Forked,
    Preempted,
    Proposed,
    Sampled,
    Scheduled,
    Speculated,
    State,
    SwappedOut,
)
from minipaged.events.waste import AHEAD, longest_reservation, next_power_of_two, reservation

E = TypeVar("E", bound=Event)
CHOICES = 4


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: ``choices[answer]`` is correct, and ``why`` explains it."""

    text: str
    choices: list[str]
    answer: int
    why: str


class Quiz:
    """Follows a run's events and finds the first step that answers the question called ``name``."""

    def __init__(self, name: str, started: Event) -> None:
        self._make = QUESTIONS[name]
        self._state = State()
        self._state.apply(started)

    def question(self, events: list[Event]) -> Question | None:
        """The question whose answer is in ``events``, or ``None``. Call it before `saw` gets these events."""
        return self._make(self._state, events)

    def saw(self, events: list[Event]) -> None:
        for event in events:
            self._state.apply(event)


def letter(seq_id: int) -> str:
    """The page's name of a sequence: A … Z, A2 … Z2, and so on."""
    return chr(65 + seq_id % 26) + (str(seq_id // 26 + 1) if seq_id >= 26 else "")


def _names(seq_ids: Iterable[int]) -> str:
    *most, last = map(letter, seq_ids)
    return f"{', '.join(most)} and {last}" if most else last


def _of(kind: type[E], events: list[Event]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def _live(state: State, request_id: str) -> list[int]:
    return [seq_id for seq_id in state.requests[request_id] if state.seqs[seq_id].finish_reason is None]


def _number(text: str, answer: int, others: Iterable[int], why: str) -> Question:
    """A question with numbers as choices: the answer, and up to three numbers of ``others`` that differ from it."""
    wrong = [n for n in dict.fromkeys(others) if n != answer and n >= 0][: CHOICES - 1]
    choices = sorted([answer, *wrong])
    return Question(text, [f"{n:,}" for n in choices], choices.index(answer), why)


def _victim(state: State, events: list[Event]) -> Question | None:
    if not (preempted := _of(Preempted, events)):
        return None
    running, victim = list(state.running), preempted[0].request_id
    asked = [r for r in running if r in {running[0], *running[1 - CHOICES :], victim}]
    name = _names(_live(state, victim))
    choices = [_names(_live(state, request)) for request in asked]
    return Question(
        "The next step needs a block, and none is free. Who has to give its blocks back?",
        choices,
        choices.index(name),
        f"{name} came last. First come, first served: whoever has waited longest keeps its blocks.",
    )


def _copies(state: State, events: list[Event]) -> Question | None:
    copies = _of(Copied, events)
    shared = [seq_id for seq_id, seq in state.seqs.items() if copies and copies[0].src in seq.table]
    if len(shared) < 3:
        return None
    blocks = len(state.seqs[shared[0]].table)
    return _number(
        f"{_names(shared)} share all {blocks} blocks of their prompt. Next, each writes a word of its own. "
        "How many blocks are copied?",
        len(copies),
        (0, 1, len(shared), blocks * len(shared)),
        f"All of them write into block {copies[0].src}. Each copies it first, but the last finds itself alone with "
        "the original. Full blocks are never written to again and stay shared.",
    )


def _pruned(state: State, events: list[Event]) -> Question | None:
    pruned = [event.seq_id for event in _of(Finished, events) if event.reason == "pruned"]
    heirs = [event.parent for event in _of(Forked, events)]
    if len(pruned) != 1 or not heirs:
        return None
    beams = _live(state, state.seqs[pruned[0]].request_id)
    scores = {beam: sum(p or 0.0 for p in state.seqs[beam].logprobs[state.seqs[beam].num_prompt :]) for beam in beams}
    if len(beams) < 3 or len({f"{score:.1f}" for score in scores.values()}) < len(beams):
        return None
    lowest = min(scores, key=lambda beam: scores[beam]) == pruned[0]
    return Question(
        "Beams and their log-probabilities so far. Which one is given up in the next step?",
        [f"{letter(beam)} ({scores[beam]:.1f})" for beam in beams],
        beams.index(pruned[0]),
        f"All continuations of all beams compete, and none of {letter(pruned[0])}'s is among the best; "
        + ("it was behind already. " if lowest else "its score was not the lowest, but its next words are unlikely. ")
        + f"{letter(heirs[0])} goes on twice instead.",
    )


def _cached(state: State, events: list[Event]) -> Question | None:
    found = next((event for event in _of(Admitted, events) if event.num_cached), None)
    if found is None:
        return None
    seq, size = state.seqs[found.seq_id], state.config["block_size"]
    others = [other.tokens for seq_id, other in state.seqs.items() if seq_id != found.seq_id]
    common = max((_common(seq.tokens, other) for other in others), default=found.num_cached)
    return _number(
        f"{letter(found.seq_id)} has a prompt of {len(seq.tokens)} tokens, and its first {common} have been seen "
        "before. How many does it find in the cache?",
        found.num_cached,
        (common, 0, len(seq.tokens)),
        f"{found.num_cached // size} full blocks of {size}: only full blocks are kept under a name. The rest of the "
        f"{common} stands in a block that goes on differently.",
    )


def _given_up(state: State, events: list[Event]) -> Question | None:
    evicted = _of(Evicted, events)
    unused = [block for block in sorted(state.cached, key=state.cached.__getitem__) if not state.ref_counts[block]]
    ones = [block for block in unused if state.predicted.get(block)]
    zeros = [block for block in unused if not state.predicted.get(block)]
    if not evicted or evicted[0].block not in ones or len(ones) < 2 or not zeros:
        return None
    block = evicted[0].block
    # Blocks enter the cache in order, so the first of the 1s has the prefix that the others continue.
    asked = sorted({block, next(one for one in ones if one != block), *zeros[: CHOICES - 2]})
    return Question(
        "No block is free, so a cached one is given up. Its bit says whether its chat said goodbye (1). Which one?",
        [f"block {b}, bit {int(b in ones)}" for b in asked],
        asked.index(block),
        f"Bit 1, and nothing continues it: without block {block}, what comes before it can still be found. "
        f"Block {zeros[0]} is older, but may be needed again.",
    )


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _moved(state: State, events: list[Event]) -> Question | None:
    swapped = _of(SwappedOut, events)
    if not swapped:
        return None
    moved = len({block for event in swapped for block in event.blocks})
    name = _names(event.seq_id for event in swapped)
    return _number(
        f"No block is free, so {name} has to make room. How many of its blocks are moved to the CPU?",
        moved,
        (1, max(2, moved // 2), len(state.ref_counts)),
        f"All {moved}: attention needs every earlier token's keys and values, so a text with some of its blocks away "
        "cannot go on at all.",
    )


def _chunk(state: State, events: list[Event]) -> Question | None:
    budget = state.config["max_num_batched_tokens"]
    new = next((e.seq_id for e in _of(Admitted, events) if len(state.seqs[e.seq_id].tokens) > budget), None)
    if new is None:
        return None
    counts = {event.seq_id: event.num_tokens for event in _of(Scheduled, events)}
    writing = len(counts) - 1
    return _number(
        f"{letter(new)} brings a prompt of {len(state.seqs[new].tokens)} tokens; a step computes {budget}, and "
        f"{writing} texts are being written. How many of them are computed next?",
        counts[new],
        (0, budget, len(state.seqs[new].tokens)),
        f"Those who write get their one token each, and {letter(new)} the rest of the {budget}.",
    )


def _admitted(state: State, events: list[Event]) -> Question | None:
    limit, waiting, running = state.config["max_num_seqs"], len(state.waiting), len(state.running)
    started = len(_of(Admitted, events))
    if not started or waiting <= limit:
        return None
    return _number(
        f"{waiting} requests are waiting, {running} text is being written, and at most {limit} run at once. "
        "How many begin in the next step?",
        started,
        (0, limit, waiting, 1),
        f"There is room for {started} beside the one that runs. They begin together, and the rest waits in order of "
        "arrival.",
    )


def _group(state: State, events: list[Event]) -> Question | None:
    joined = [event for event in _of(Admitted, events) if event.num_cached]
    if len(joined) < 2 or not state.groups:
        return None
    prompts = sum(len(state.seqs[event.seq_id].tokens) for event in joined)
    found = sum(event.num_cached for event in joined)
    return _number(
        f"{_names(event.seq_id for event in joined)} join their groups now. Their prompts have {prompts} tokens in "
        "all. How many must be computed?",
        prompts - found,
        (prompts, joined[0].num_cached, 0),
        f"Each takes the blocks that its group keeps into its table, as they are: {found} tokens are found, and only "
        "what is its own is computed.",
    )


def _first_blocks(state: State, events: list[Event]) -> Question | None:
    admitted = _of(Admitted, events)
    if not admitted or not state.finished:
        return None
    seq, name, size = state.seqs[admitted[0].seq_id], letter(admitted[0].seq_id), state.config["block_size"]
    taken = sum(event.seq_id == admitted[0].seq_id for event in _of(Allocated, events))
    whole = -(-seq.limit // size)
    return _number(
        f"{name} has {seq.num_prompt} tokens and may write {seq.limit - seq.num_prompt} more. "
        f"How many blocks of {size} does it take in the next step?",
        taken,
        (whole, next_power_of_two(whole), 0, whole // 2),
        f"{seq.num_prompt} tokens need no more. It gets another block when it has filled what it has, wherever one is "
        "free; nothing is set aside, so nothing has to lie side by side.",
    )


def _holes(state: State, events: list[Event]) -> Question | None:
    memory, size = state.config.get("memory", "paged"), state.config["block_size"]
    if memory not in AHEAD or not state.waiting or not state.running:
        return None
    seq = state.seqs[state.requests[state.waiting[0]][0]]
    name, pieces = letter(state.requests[state.waiting[0]][0]), _free_pieces(state)
    longest = longest_reservation(state.config["max_model_len"], len(state.ref_counts), size)
    asked = -(-reservation(memory, seq.num_prompt, seq.limit - seq.num_prompt, longest) // size)
    if asked > sum(pieces) or asked <= max(pieces):
        return None
    begins = bool(_of(Admitted, events))
    why = (
        f"No hole is longer than {max(pieces)} blocks, and a text needs neighbours. It waits until two holes become "
        "one. With paging, any blocks would do."
    )
    victim = _names(_live(state, list(state.running)[-1]))
    return Question(
        f"{sum(pieces)} of {len(state.ref_counts)} blocks are free, in {len(pieces)} holes. {name} asks for {asked} "
        "neighbouring blocks. What happens next?",
        [f"{name} begins", f"{name} waits", f"{victim} makes room"],
        0 if begins else 1,
        why if not begins else f"There was a piece of {asked} blocks after all.",
    )


def _guessed(state: State, events: list[Event]) -> Question | None:
    ended = {event.seq_id for event in _of(Finished, events)}
    going = [event for event in _of(Speculated, events) if event.seq_id not in ended]
    told = next((event for event in going if 0 < event.accepted < event.proposed), None)
    if told is None:
        return None
    name, accepted, proposed = letter(told.seq_id), told.accepted, told.proposed
    guess = next("".join(event.pieces) for event in _of(Proposed, events) if event.seq_id == told.seq_id)
    return _number(
        f"{name} guesses that “{guess.strip()}” comes next, and computes these {proposed} tokens along. How many "
        "tokens does it get in the next step?",
        sum(event.seq_id == told.seq_id for event in _of(Sampled, events)),
        (1, proposed, proposed + 1, accepted),
        f"{accepted} of the {proposed} are what the model says by itself, and behind the last of these it says one "
        "more. The rest is taken back.",
    )


def _free_pieces(state: State) -> list[int]:
    """Lengths of the free pieces: runs of adjacent blocks that are in no block table."""
    return [len(list(run)) for count, run in groupby(state.ref_counts) if count == 0]


QUESTIONS: dict[str, Callable[[State, list[Event]], Question | None]] = {
    "victim": _victim,
    "copies": _copies,
    "pruned": _pruned,
    "cached": _cached,
    "given_up": _given_up,
    "moved": _moved,
    "chunk": _chunk,
    "admitted": _admitted,
    "group": _group,
    "first_blocks": _first_blocks,
    "holes": _holes,
    "guessed": _guessed,
}
