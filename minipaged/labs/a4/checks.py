"""What lab A4's block tables must do, from single calls to the whole engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

from minipaged.config import EngineConfig
from minipaged.core.plan import Write
from minipaged.events import Admitted, EngineStarted, EventLog, Filled, Finished, Forked, RequestAdded
from minipaged.labs import toy
from minipaged.labs.a4.proxy import LabTables
from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import expect


def manager(student: Any, config: EngineConfig, events: EventLog) -> LabTables:
    """The memory manager with which the engine runs on the student's code."""
    return LabTables(student, config, events)


class Bench:
    """Runs a trace: "open", and "append", "fork", "free" with a number that chooses among the open sequences, so that a
    trace with steps left out still makes sense."""

    def __init__(self, trial: Trial, num_blocks: int, block_size: int, tape: Tape) -> None:
        events = EventLog()
        events.subscribe(tape.record)
        config = EngineConfig(model="lab", num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=False)
        tape.record(EngineStarted("your block tables", block_size, num_blocks, 64, 64, 64, False, "recompute", 0, 0))
        tape.say(f"block_size {block_size}, a pool of {num_blocks} blocks")
        self.tape, self._next = tape, 0
        self.tables = LabTables(trial.student, config, events)

    def do(self, action: str, choice: int) -> None:
        seqs = list(self.tables.tables)
        if action == "open":
            self.open()
        elif seqs:
            getattr(self, action)(seqs[choice % len(seqs)])

    def open(self) -> None:
        seq = self._new()
        self.tape.begin(f"open({seq})")
        self.tape.record(RequestAdded(f"sequence-{seq}", [seq], [0], ["·"], 63))
        self.tape.record(Admitted(f"sequence-{seq}", seq, 0))
        self.tables.open(seq)

    def append(self, seq: int) -> None:
        length, call = self.tables.lengths[seq], f"append_slot({seq})"
        if self.tables.blocks_needed([Write(seq, length, length + 1)]) > self.tables.pool.num_free:
            self.tape.begin(f"{call}, with no block free, must raise OutOfBlocks")
            expect(lambda: self.tables._theirs.call("append_slot", seq), "OutOfBlocks", call, "no block is free")
            self.tables.compare(f"the refused {call}")
            return
        self.tape.begin(call)
        copy = self.tables.append_slot(seq)
        self.tape.lines[-1] += f" → {f'CopyOp{tuple(copy)}' if copy else None}   # {self.tables.tables[seq]}"
        self.tape.record(Filled(seq, length, 1))

    def fork(self, seq: int) -> None:
        child = self._new()
        self.tape.begin(f"fork({seq}, {child})")
        self.tape.record(Forked(seq, child, f"sequence-{child}"))
        self.tables.fork(seq, child)

    def free(self, seq: int) -> None:
        self.tape.begin(f"free({seq})")
        self.tables.free(seq)
        self.tape.record(Finished(seq, "stop"))

    def _new(self) -> int:
        self._next += 1
        return self._next - 1


def _run(trial: Trial, trace: Trace, tape: Tape) -> None:
    sizes = trace[0] if trace and trace[0][0] == "sizes" else ("sizes", 6, 2)
    bench = Bench(trial, sizes[1], sizes[2], tape)
    for step in trace:
        if step[0] != "sizes":
            bench.do(*step)


def _traces(random: Random, number: int, actions: dict[str, int]) -> Iterator[Trace]:
    """First short ones, in small pools."""
    for index in range(number):
        chosen = random.choices(list(actions), list(actions.values()), k=8 + 2 * index)
        sizes = ("sizes", random.randrange(2, 5 + index), random.choice((1, 2, 3, 4)))
        yield [sizes, ("open", 0), *((action, random.randrange(100)) for action in chosen)]


def _search(trial: Trial, number: int, **actions: int) -> None:
    trial.search(_traces(trial.random, number, actions), lambda trace, tape: _run(trial, trace, tape))


def a4_1(trial: Trial) -> None:
    """Sequences that share nothing grow block by block."""
    _search(trial, 12, open=1, append=8, free=1)


def a4_2(trial: Trial) -> None:
    """Forks of sequences that have ended on a block's last slot, and of forks: nothing is copied."""
    _search(trial, 8, open=2, append=0, fork=2, free=1)
    for block_size in (1, 2, 4):
        trace = [("sizes", 8, block_size), ("open", 0), *[("append", 0)] * (2 * block_size), ("fork", 0), ("fork", 1)]
        ended = [*trace, ("free", 0), ("fork", 0), ("free", 2), ("free", 0), ("free", 0)]
        grown = [*trace, ("append", 0), ("append", 1), ("fork", 0)]  # into new blocks: the last ones are full
        trial.search([trace, ended, grown], lambda trace, tape: _run(trial, trace, tape))


def a4_3(trial: Trial) -> None:
    """Everything, in random order."""
    _search(trial, 24, open=1, append=8, fork=3, free=1)


def a4_4(trial: Trial) -> None:
    """In the engine: several samples of one prompt, and a pool so small that it preempts."""

    def run(trace: Trace, tape: Tape) -> None:
        engine = toy.toy_engine(partial(manager, trial.student), num_blocks=12, block_size=3)
        toy.serve(engine, trace, tape)

    trial.search([toy.requests(trial.random, 8, longest=8, samples=3)], run)


CHECKS = {"A4.1": a4_1, "A4.2": a4_2, "A4.3": a4_3, "A4.4": a4_4}
