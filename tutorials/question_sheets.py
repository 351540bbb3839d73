"""Predict, then run: a sheet of questions for each student, and its key, answered by the engine itself.

    python tutorials/question_sheets.py --student ada --secret-file secret.txt          the sheet
    python tutorials/question_sheets.py --student ada --secret-file secret.txt --key    the sheet with answers

The numbers in a question are drawn from HMAC(secret, student|question): every student has their own, the same each
time, and nobody without the secret can work them out beforehand. The secret is a line of at least 16 characters
that stays with the teacher. Every answer is read off a run of minipaged's scheduler and memory manager, without a
model; so it takes no torch and no time.
"""

from __future__ import annotations

import argparse
import hmac
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.plan import SampledToken, StepPlan
from minipaged.events import Admitted, Copied, Event, Freed, Preempted, Scheduled
from minipaged.events.waste import reservation

SHORTEST_SECRET = 16  # characters


class Question(NamedTuple):
    """``after``: the tutorial that teaches it. ``answer`` is what the engine did."""

    name: str
    after: int
    text: str
    answer: str


class NoModel:
    """A runner that computes nothing: who gets which block does not depend on what the model says."""

    def __init__(self) -> None:
        self.maps: list[int] = []  # page-groups mapped, step by step, under vAttention

    def execute(self, plan: StepPlan) -> None:
        if plan.maps is not None:
            self.maps.append(len(plan.maps.maps))
            plan.maps.done = True


class Run:
    """An engine of its own for one question, and everything that happened in it."""

    def __init__(self, **settings: Any) -> None:
        fields: dict[str, Any] = {"num_blocks": 64, "max_model_len": 512, "enable_prefix_caching": False} | settings
        self.runner, self.events = NoModel(), list[Event]()
        self.engine = assemble(EngineConfig(**fields), self.runner, _sample, vocab_size=10_000)
        self.engine.events.subscribe(self.events.append)

    def add(self, name: str, prompt: int | list[int], generate: int, n: int = 1) -> None:
        """``prompt``: its tokens, or how many, if it does not matter which."""
        tokens = prompt if isinstance(prompt, list) else [ord(name)] * prompt
        self.engine.add_request(name, tokens, SamplingParams(max_tokens=generate, ignore_eos=True, n=n))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.check()

    def finish(self) -> None:
        while self.engine.has_unfinished():
            self.steps(1)

    def seen(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def _sample(_: None, plan: StepPlan) -> list[SampledToken]:
    return [SampledToken(0) for _ in plan.samples]


# --- the questions: each draws its numbers, lets the engine run, and reads the answer off ---


def reserved(rng: Random) -> tuple[str, str]:
    prompt, output = rng.randint(20, 90), rng.randint(33, 120)
    slots = reservation("orca-pow2", prompt, output, longest=2048)
    text = (
        f"A request has a prompt of {prompt} tokens and will generate {output}. A manager that rounds the output "
        "up to a power of two sets memory aside when it starts. How many slots? How many of them never hold a "
        "token's KV? (The KV of the last token is never computed.)"
    )
    return text, f"{slots} slots, {slots - (prompt + output - 1)} never used"


def rows(rng: Random) -> tuple[str, str]:
    prompt, output = rng.randint(5, 30), rng.randint(5, 30)
    run = Run(block_size=4)
    run.add("A", prompt, output)
    run.finish()
    with_cache = sum(event.num_tokens for event in run.seen(Scheduled))
    without = sum(range(prompt, prompt + output))
    text = (
        f"A prompt of {prompt} tokens, {output} more generated. How many rows (tokens) does the model compute with "
        "a KV cache? How many if it computed the whole text anew for each token?"
    )
    return text, f"{with_cache} with, {without} without"


def table(rng: Random) -> tuple[str, str]:
    size = rng.choice((3, 4, 5))
    first, second, more = rng.randint(6, 14), rng.randint(4, 9), rng.randint(3, 6)
    run = Run(block_size=size)
    run.add("A", first, 20)
    run.add("B", second, 20)
    run.steps(1 + more)
    held = run.engine.block_tables()
    empty = [len(held[0]) * size - first - more, len(held[1]) * size - second - more]
    text = (
        f"Block size {size}, an empty pool that hands out blocks 0, 1, 2, … A has a prompt of {first} tokens, B of "
        f"{second}. Both prompts are computed in the first step, A's blocks first; then {more} steps of decoding "
        "(each computes the KV of one more token of A, then of B). What are the two block tables, and how many "
        "slots of each are empty?"
    )
    return text, f"A {held[0]}, {empty[0]} empty; B {held[1]}, {empty[1]} empty"


def reuse(rng: Random) -> tuple[str, str]:
    first, second, third = rng.randint(9, 16), rng.randint(5, 8), rng.randint(9, 12)
    run = Run(block_size=4, num_blocks=8)
    run.add("A", first, 2)
    run.add("B", second, 12)
    run.steps(2)  # A ends
    run.add("C", third, 4)
    run.steps(1)
    held = run.engine.block_tables()
    text = (
        f"A pool of 8 blocks of 4 slots. A (prompt of {first} tokens) and B ({second}) start together, A's blocks "
        "first. A ends after its second token, and gives its blocks back, last one first, to the end of the "
        f"queue. In the next step C starts with a prompt of {third} tokens (B is served before it). What are the "
        "tables of B and C?"
    )
    return text, f"B {held[1]}, C {held[2]}"


def slot(rng: Random) -> tuple[str, str]:
    size, other, prompt = rng.choice((4, 8)), rng.randint(5, 20), rng.randint(20, 40)
    position = rng.randrange(prompt)
    run = Run(block_size=size)
    run.add("A", other, 20)
    run.add("B", prompt, 20)
    run.steps(1)
    block = run.engine.block_tables()[1][position // size]
    text = (
        f"Block size {size}. A (prompt of {other}) and B (prompt of {prompt}) start together in an empty pool that "
        f"hands out blocks 0, 1, 2, …, A's first. In which slot of the pool (block · {size} + offset) is the key "
        f"of B's token number {position}, counted from 0?"
    )
    return text, f"slot {block * size + position % size}, in block {block}"


def chunks(rng: Random) -> tuple[str, str]:
    budget, writers = rng.randint(10, 20), rng.randint(2, 5)
    prompt = rng.randint(2 * budget, 4 * budget)
    run = Run(block_size=4, max_num_batched_tokens=budget, max_num_seqs=8)
    for number in range(writers):
        run.add("ABCDE"[number], 1, 60)
    run.steps(1)
    run.add("P", prompt, 4)
    sizes: list[int] = []
    while sum(sizes) < prompt:
        run.steps(1)
        sizes.append(run.seen(Scheduled)[-1].num_tokens)
    text = (
        f"A step computes at most {budget} tokens. {writers} texts are decoding when a prompt of {prompt} tokens "
        "arrives. In how many steps is it computed, and what are its chunks?"
    )
    return text, f"{len(sizes)} steps, chunks {sizes}"


def victim(rng: Random) -> tuple[str, str]:
    size, blocks = 4, rng.randint(6, 9)
    prompts = [rng.randint(3, 7) for _ in range(3)]
    run = Run(block_size=size, num_blocks=blocks)
    for name, prompt in zip("ABC", prompts, strict=True):
        run.add(name, prompt, 20)
    run.steps(1)
    if len(run.engine.block_tables()) < 3:
        return victim(rng)  # C had to wait: draw others
    steps = 1
    while not run.seen(Preempted):
        run.steps(1)
        steps += 1
    (freed,) = run.seen(Freed)
    text = (
        f"{blocks} blocks of {size} slots. A, B and C start together in step 1, with prompts of {prompts[0]}, "
        f"{prompts[1]} and {prompts[2]} tokens; each may generate 20. In which step is somebody preempted, who, "
        "and how many blocks does that free?"
    )
    return text, f"step {steps}, {run.seen(Preempted)[0].request_id}, {len(freed.blocks)} blocks"


def copies(rng: Random) -> tuple[str, str]:
    size, n = 4, rng.randint(2, 5)
    prompt, more = rng.randint(5, 18), rng.randint(2, 6)
    run = Run(block_size=size)
    run.add("A", prompt, 40, n=n)
    run.steps(1 + more)
    used = len({block for held in run.engine.block_tables().values() for block in held})
    text = (
        f"Block size {size}. {n} samples of one prompt of {prompt} tokens, which is computed once; then {more} "
        "steps of decoding. How many blocks have been copied, and how many are in use?"
    )
    return text, f"{len(run.seen(Copied))} copied, {used} in use"


def cached(rng: Random) -> tuple[str, str]:
    size, common = rng.choice((4, 8)), rng.randint(10, 40)
    first, second = common + rng.randint(1, 8), common + rng.randint(0, 8)
    run = Run(block_size=size, enable_prefix_caching=True)
    run.add("A", [*range(common), *range(100, 100 + first - common)], 2)
    run.finish()
    run.add("B", [*range(common), *range(200, 200 + second - common)], 2)
    run.steps(1)
    found = run.seen(Admitted)[-1].num_cached
    beginning = f"the first {common} of these, and no more"
    if second > common:
        beginning = f"{second} tokens, of which the first {common} are the same and the next is another"
    text = (
        f"Block size {size}. A prompt of {first} tokens has run and ended. A second one has {beginning}. How many "
        "of its tokens are found in the prefix cache?"
    )
    return text, f"{found} tokens"


def pages(rng: Random) -> tuple[str, str]:
    size, (small, large) = 16, sorted(rng.sample(range(20, 200), 2))
    order = [large, small] if rng.random() < 0.3 else [small, large]
    run = Run(block_size=size, memory="vattention", mapping="sync", max_num_seqs=2)
    mapped = []
    for name, prompt in zip("AB", order, strict=True):
        before = sum(run.runner.maps)
        run.add(name, prompt, 1)
        run.finish()
        mapped.append(sum(run.runner.maps) - before)
    text = (
        f"vAttention, page-groups of {size} tokens, nothing mapped ahead. A text of {order[0]} tokens runs and "
        f"ends, then one of {order[1]} tokens (one token generated each, whose KV is never computed). How many "
        "page-groups are mapped for the first, and how many for the second?"
    )
    return text, f"{mapped[0]} and {mapped[1]}"


QUESTIONS: dict[str, tuple[int, Callable[[Random], tuple[str, str]]]] = {
    "reserved": (1, reserved),
    "rows": (2, rows),
    "table": (3, table),
    "reuse": (3, reuse),
    "slot": (4, slot),
    "chunks": (7, chunks),
    "victim": (7, victim),
    "copies": (8, copies),
    "cached": (9, cached),
    "pages": (11, pages),
}


def questions(student: str, secret: bytes) -> list[Question]:
    """A student's questions, always the same ones for one secret."""
    made = []
    for name, (after, make) in QUESTIONS.items():
        seed = hmac.digest(secret, f"{student}|{name}".encode(), "sha256")
        made.append(Question(name, after, *make(Random(int.from_bytes(seed)))))
    return made


def sheet(student: str, secret: bytes, with_key: bool) -> str:
    """Markdown to be handed out, or with the answers to be kept."""
    lines = [f"# Predict, then run: {student}{' (key)' if with_key else ''}"]
    for number, question in enumerate(questions(student, secret), start=1):
        lines.append(f"**{number}.** (after tutorial {question.after}) {question.text}")
        lines.append(f"→ {question.answer}" if with_key else "→ ______________________")
    return "\n\n".join(lines)


def read_secret(path: Path) -> bytes:
    """Raises `ValueError`, saying what to do, for a file that holds none."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; python -c 'import secrets; print(secrets.token_hex())' > {path}"
        ) from None
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(f"{path} holds {len(secret)} characters; a secret has at least {SHORTEST_SECRET}")
    return secret


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes a student's sheet of questions, and its key.")
    parser.add_argument("--student", required=True, help="a name or an id: each has questions of their own")
    parser.add_argument("--secret-file", required=True, type=Path, help="a file that only the teacher has")
    parser.add_argument("--key", action="store_true", help="with the answers")
    args = parser.parse_args(arguments)
    if not args.student.strip():
        parser.error("--student: give a name")
    try:
        secret = read_secret(args.secret_file)
    except ValueError as error:
        parser.error(str(error))
    print(sheet(args.student.strip(), secret, args.key))
    return 0


if __name__ == "__main__":
    sys.exit(main())
