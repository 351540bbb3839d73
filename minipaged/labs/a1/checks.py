"""What lab A1's pools must do, from single calls to the whole engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random

from minipaged.config import EngineConfig
from minipaged.events import Admitted, Allocated, EngineStarted, EventLog, Finished, Freed, RequestAdded, Shared
from minipaged.labs import toy
from minipaged.labs.a1.proxy import LabTables, ShadowPool
from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import expect


def manager(student, config: EngineConfig, events: EventLog) -> LabTables:
    """The memory manager with which the engine runs on the student's code."""
    return LabTables(student, config, events)


class Bench:
    """Runs a trace of calls on a student's pool: "allocate", "incref" and "decref" with a number that chooses among the
    references there are, so that a trace with steps left out still makes sense. Every reference is shown as a sequence.
    """

    def __init__(self, trial: Trial, num_blocks: int, tape: Tape) -> None:
        self.pool = ShadowPool(trial.student, num_blocks)
        self.tape, self.owners = tape, list[tuple[int, int]]()  # sequence, block
        self._next = 0
        tape.record(EngineStarted("your allocator", 1, num_blocks, 64, 64, 2, False, "recompute", 0, 0))

    def do(self, action: str, choice: int) -> None:
        if action == "allocate":
            self.allocate()
        elif self.owners:
            getattr(self, action)(choice % len(self.owners))

    def allocate(self) -> None:
        if not self.pool.num_free:
            call = f"allocate() with all {self.pool.num_blocks} blocks in use"
            self.tape.begin(f"{call} must raise OutOfBlocks")
            expect(lambda: self.pool._pool.call("allocate"), "OutOfBlocks", call, "nothing was free")
            self.pool._expect_free(call)
            return
        self.tape.begin("allocate()")
        block = self.pool.allocate()
        self.tape.lines[-1] += f" → {block}"
        self._show(block, shared=False)

    def incref(self, choice: int) -> None:
        block = self.owners[choice][1]
        self.tape.begin(f"incref({block})")
        self.pool.share(block)
        self._show(block, shared=True)

    def decref(self, choice: int) -> None:
        seq, block = self.owners.pop(choice)
        self.tape.begin(f"decref({block})")
        self.tape.record(Freed(seq, [block]))
        self.tape.record(Finished(seq, "stop"))
        self.pool.free(block)

    def _show(self, block: int, shared: bool) -> None:
        seq, name = self._next, f"owner-{self._next}"
        self._next += 1
        self.tape.record(RequestAdded(name, [seq], [0], [f"block {block}"], 1))
        self.tape.record(Admitted(name, seq, 0))
        self.tape.record(Shared(seq, 0, block, "fork") if shared else Allocated(seq, 0, block))
        self.owners.append((seq, block))


def a1_1(trial: Trial) -> None:
    """Only allocations: all blocks, each once, and then the right error."""
    for num_blocks in (1, 2, 7, trial.random.randrange(8, 20)):

        def run(trace: Trace, tape: Tape, num_blocks: int = num_blocks) -> None:
            bench = Bench(trial, num_blocks, tape)
            for _ in trace:
                bench.allocate()

        trial.search([range(num_blocks + 2)], run)


def a1_2(trial: Trial) -> None:
    """All that a well-behaved caller does, in random order."""
    trial.search(_traces(trial.random, 24), lambda trace, tape: _play(trial, trace, tape))


def _traces(random: Random, number: int) -> Iterator[Trace]:
    """First short ones, in small pools."""
    for index in range(number):
        actions = random.choices(("allocate", "incref", "decref"), (4, 2, 4), k=10 + index)
        yield [1 + index % 6, *((action, random.randrange(100)) for action in actions)]


def _play(trial: Trial, trace: Trace, tape: Tape) -> None:
    num_blocks = trace[0] if trace and isinstance(trace[0], int) else 2
    bench = Bench(trial, num_blocks, tape)
    for step in trace:
        if not isinstance(step, int):
            bench.do(*step)


def a1_3(trial: Trial) -> None:
    """Misuse: the right error, and nothing has changed."""
    size = trial.random.randrange(3, 9)

    def run(trace: Trace, tape: Tape) -> None:
        bench = Bench(trial, size, tape)
        for action, block, why in trace:
            if action == "allocate":
                bench.allocate()
            elif action == "free all":
                while bench.owners:
                    bench.decref(0)
            else:
                _refused(bench, action, block, why)
        for _ in range(size + 1 - len(bench.owners)):  # all that is free is still there to be handed out
            bench.allocate()

    unknown = [(action, block, f"the pool has blocks 0 to {size - 1}")
               for action in ("incref", "decref") for block in (-1, -size, size, size + 7)]  # fmt: skip
    free = [("free all", 0, "")] + [
        (action, block, f"block {block} is free") for action in ("decref", "incref") for block in range(size)
    ]
    trial.search([[("allocate", 0, "")] * 2 + unknown, [("allocate", 0, "")] * 2 + free], run)


def _refused(bench: Bench, action: str, block: int, why: str) -> None:
    if 0 <= block < bench.pool.num_blocks and bench.pool.ref_counts[block]:
        return
    call = f"{action}({block})"
    bench.tape.begin(f"{call} must raise BlockError")
    expect(lambda: bench.pool._pool.call(action, block), "BlockError", call, why)
    bench.pool._expect_free(f"the refused {call}")


def a1_4(trial: Trial) -> None:
    """In the engine, with forks and with a pool so small that it preempts."""

    def run(trace: Trace, tape: Tape) -> None:
        engine = toy.toy_engine(partial(manager, trial.student), num_blocks=9, block_size=2)
        toy.serve(engine, trace, tape)

    trial.search([toy.requests(trial.random, 10, longest=6, samples=2)], run)


CHECKS = {"A1.1": a1_1, "A1.2": a1_2, "A1.3": a1_3, "A1.4": a1_4}
