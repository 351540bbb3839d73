"""The engine itself keeps the rules that labs check in students' solutions."""

from __future__ import annotations

from random import Random

import pytest

from minipaged.core.pool import BlockPool
from minipaged.core.scheduler import Scheduler
from minipaged.errors import BlockError, OutOfBlocks
from minipaged.labs import find, toy
from minipaged.labs.a1.reference import BlockPool as Twin
from minipaged.labs.a5.proxy import judge_fairness
from minipaged.labs.checking import Tape, check


class Judged(Scheduler):
    """The engine's scheduler, with its plans checked like a student's."""

    judged = 0

    def schedule(self):
        plan = super().schedule()
        if not plan.preempted and not plan.outgrown:
            judge_fairness(self, {chunk.request.arrival: chunk.num_tokens for chunk in plan.chunks})
            Judged.judged += 1
        return plan


@pytest.mark.parametrize("seed", range(6))
def test_the_engines_scheduler_is_as_fair_as_lab_a5_wants(seed):
    random, before = Random(seed), Judged.judged
    max_num_seqs = random.randrange(1, 5)
    engine = toy.toy_engine(
        make_scheduler=Judged,
        num_blocks=random.randrange(9, 14),
        block_size=2,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=random.randrange(max_num_seqs, 12),
    )
    toy.serve(engine, toy.requests(random, 10, 8, samples=1), Tape(), every=random.randrange(3))
    assert Judged.judged > before


def outcome(call, *args):
    try:
        return call(*args)
    except Exception as error:
        return {cls.__name__ for cls in type(error).__mro__} & {OutOfBlocks.__name__, BlockError.__name__}


def test_lab_a1s_reference_and_the_engines_pool_do_the_same():
    """They also allocate blocks in the same order, which the lab does not require."""
    random = Random(1)
    for size in (1, 2, 5):
        twin, pool = Twin(size), BlockPool(size)
        for _ in range(500):
            block = random.randrange(-1, size + 1)
            pairs = [(twin.allocate, pool.allocate), (twin.incref, pool.share), (twin.decref, pool.free)]
            (mine, engines) = random.choice(pairs)
            args = () if mine == twin.allocate else (block,)
            assert outcome(mine, *args) == outcome(engines, *args)
            assert (twin.num_free, twin.ref_counts) == (pool.num_free, pool.ref_counts)


@pytest.mark.parametrize(
    ("key", "task", "answer"),
    [
        ("A4", "A4.1", "BlockTables.all_tables = lambda self: [('x', [], 0)]"),
        ("A4", "A4.1", "BlockTables.all_tables = lambda self: [(None, table, 0) for table in self.tables.values()]"),
        ("A4", "A4.1", "BlockTables.all_tables = lambda self: 7"),
        ("A7", "A7.2", "def attend(q, *rest): return [one.to(torch.float8_e4m3fn) for one in (q, q[:, 0], q[:, 0])]"),
    ],
    ids=range(4),
)
def test_an_answer_of_a_strange_type_is_wrong_and_no_bug_of_the_checks(key, task, answer):
    lab, names = find(key), {"__name__": "answer"}
    exec(compile(f"{lab.reference()}\n{answer}", "answer", "exec"), names)
    (result,) = check(lab, names, tasks=[task], shrink=False)
    assert result.status == "fail"


@pytest.mark.parametrize("key", ["A1", "A4", "A6"])
def test_labs_on_a_twin_run_the_engines_own_code_too(key):
    assert find(key).engine is not None
