"""What lab A6's prefix caches must do, from single texts to the whole engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

from minipaged.config import EngineConfig
from minipaged.core.plan import Write
from minipaged.events import Admitted, EngineStarted, EventLog, Filled, Finished, RequestAdded
from minipaged.labs import toy
from minipaged.labs.a6.proxy import LabTables
from minipaged.labs.checking import Tape, Trace, Trial

SETTINGS = {"enable_prefix_caching": True}


def manager(student: Any, config: EngineConfig, events: EventLog) -> LabTables:
    """The memory manager with which the engine runs on the student's code."""
    return LabTables(student, config, events)


class Bench:
    """Runs a trace: ("text", tokens) computes a text, ("end", choice) ends one, ("evict", n) gives up blocks."""

    def __init__(self, trial: Trial, num_blocks: int, block_size: int, hash_bits: int, tape: Tape) -> None:
        events = EventLog()
        events.subscribe(tape.record)
        config = EngineConfig(model="lab", num_blocks=num_blocks, block_size=block_size)
        tape.record(EngineStarted("your prefix cache", block_size, num_blocks, 64, 64, 64, True, "recompute", 0, 0))
        tape.say(f"PrefixCache(block_size={block_size}, hash_bits={hash_bits})")
        self.tape, self._next = tape, 0
        self.tables = LabTables(trial.student, config, events, hash_bits)

    def text(self, tokens: tuple[int, ...]) -> None:
        if self.tables.blocks_for(len(tokens)) > self.tables.pool.num_free:
            return
        seq, name = self._next, f"text-{self._next}"
        self._next += 1
        self.tape.begin(f"a text of {list(tokens)}")
        self.tape.record(RequestAdded(name, [seq], list(tokens), [f"{token} " for token in tokens], 1))
        hits = self.tables.match(tokens)
        self.tape.say(f"  match → {[hit.block for hit in hits]}")
        start = len(hits) * self.tables.block_size
        self.tape.record(Admitted(name, seq, start))
        self.tables.open(seq, hits)
        self.tables.reserve(Write(seq, start, len(tokens)))
        self.tape.record(Filled(seq, start, len(tokens) - start))
        self.tables.mark_computed(seq, tokens, len(tokens))
        self.tape.say(f"  its blocks: {self.tables.tables[seq]}")

    def end(self, choice: int) -> None:
        seqs = list(self.tables.tables)
        if seqs:
            seq = seqs[choice % len(seqs)]
            self.tape.begin(f"text {seq} ends: its blocks {self.tables.tables[seq]} lose an owner, the last one first")
            self.tables.free(seq)
            self.tape.record(Finished(seq, "stop"))

    def evict(self, n: int) -> None:
        self.tape.begin(f"evict({n})")
        blocks = self.tables.cache.evict_many(n)
        self.tape.lines[-1] += f" → {blocks}"
        for block in blocks:
            # The cache hands an evicted block to a new owner, as in `BlockPool.allocate`; this one frees it at once.
            self.tables.pool.ref_counts[block] = 1
            self.tables.pool.free(block)


def _run(trial: Trial, trace: Trace, tape: Tape) -> None:
    num_blocks, block_size, hash_bits = trace[0][1] if trace and trace[0][0] == "sizes" else (8, 2, 32)
    bench = Bench(trial, num_blocks, block_size, hash_bits, tape)
    for action, argument in trace:
        if action != "sizes":
            getattr(bench, action)(argument)


def _texts(random: Random, number: int, block_size: int, letters: int = 2) -> list[tuple[int, ...]]:
    """Short texts of few different tokens, so that many begin alike."""
    return [tuple(random.choices(range(letters), k=random.randint(1, 4 * block_size))) for _ in range(number)]


def a6_1(trial: Trial) -> None:
    """Texts that stay: what was computed once is found again."""
    for block_size in (1, 2, 3):
        texts = _texts(trial.random, 10, block_size)
        texts += [texts[-1], texts[-1] + texts[0]]
        trial.search([[("sizes", (60, block_size, 32)), *(("text", text) for text in texts)]], partial(_run, trial))


def a6_2(trial: Trial) -> None:
    """The same, with hashes so short that different contents often have the same."""
    for hash_bits in (0, 1, 2):
        texts = _texts(trial.random, 12, 2, letters=3)
        same_end = [(0, 1, 2, 2, 0), (1, 0, 2, 2, 0), (1, 0, 2, 2, 1)]  # the second block alike, after another first
        trace = [("sizes", (80, 2, hash_bits)), *(("text", text) for text in (*same_end, *texts))]
        trial.search([trace], partial(_run, trial))


def _traces(random: Random, number: int) -> Iterator[Trace]:
    for index in range(number):
        block_size = random.choice((1, 2))
        texts = _texts(random, 8 + index, block_size)
        trace: list[tuple[str, Any]] = [("sizes", (random.randint(5, 9), block_size, random.choice((1, 32))))]
        for text in texts:
            actions = ("end", 0), ("end", random.randrange(9)), ("evict", 2)
            trace += [("text", text), random.choices(actions, (6, 4, 1))[0]]
        yield trace


def a6_3(trial: Trial) -> None:
    """Texts end, and a small pool takes back what nobody uses."""
    long, short = ("text", (0, 1, 0, 1, 0)), ("text", (1, 1, 0))
    basics = [long, short, ("end", 0), ("end", 0), ("evict", 2), long]
    trial.search([basics, *_traces(trial.random, 10)], partial(_run, trial))


def a6_4(trial: Trial) -> None:
    """In the engine: prompts that begin alike, in a pool that runs full. The tokens are those without any cache."""

    def run(trace: Trace, tape: Tape) -> None:
        settings: dict[str, Any] = {"num_blocks": 14, "block_size": 3, "enable_prefix_caching": True, "max_num_seqs": 4}
        toy.serve(toy.toy_engine(partial(manager, trial.student), **settings), trace, tape)

    random = trial.random
    stems = [[random.randrange(toy.VOCAB) for _ in range(length)] for length in (3, 6, 9)]
    drawn = toy.requests(random, 10, 4, samples=2)
    trial.search([[(random.choice(stems) + prompt, num_output, n) for prompt, num_output, n in drawn]], run)


CHECKS = {"A6.1": a6_1, "A6.2": a6_2, "A6.3": a6_3, "A6.4": a6_4}
