"""BatchLLM (batches with prefix groups): the plan against brute force, and the engine against the plan."""

from itertools import combinations
from random import Random
from types import SimpleNamespace

import pytest

from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.plan import SampledToken
from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.events import Admitted, GroupEnded, GroupStarted, Preempted, PrefixKept, PrefixReleased, State
from minipaged.features.batchllm.groups import BatchItem
from minipaged.features.batchllm.planning import Node, best, groups_of, plan, prefix_tree
from tests.fake import VOCAB, fake_engine, fake_sampler, running_groups, unbatched, unbatched_beams

# --- the plan -------------------------------------------------------------------------------------------------


def nodes_of(node):
    return [node, *(below for child in node.children for below in nodes_of(child))]


def saved_by(is_open, node, above=0):
    """The number of prompt tokens that a set of open nodes saves, by definition."""
    if node in is_open:
        return (len(node.requests) - 1) * node.depth + sum(saved_by(is_open, c, node.depth) for c in node.children)
    return len(node.requests) * above + sum(saved_by(is_open, child, above) for child in node.children)


def brute_force(root):
    nodes = nodes_of(root)[1:]
    return max(saved_by(chosen, root) for k in range(len(nodes) + 1) for chosen in combinations(nodes, k))


def random_tree(random, depth=0, level=0):
    node = Node(depth, [random.random() for _ in range(random.randint(0, 4))])
    if level < 3:
        deeper = [depth + random.randint(1, 9) for _ in range(random.randint(0, 2))]
        node.children = [random_tree(random, below, level + 1) for below in deeper]
    return node


def test_the_dynamic_program_equals_brute_force_on_random_trees():
    random, tried = Random(0), 0
    while tried < 150:
        root = random_tree(random)
        if 2 <= len(nodes_of(root)) <= 9:
            tried += 1
            saved, opens = best(root)
            groups = groups_of(root, opens)
            assert saved == brute_force(root)
            assert saved == sum((len(group.members) - 1) * group.num_blocks for group in groups)
            assert sorted(i for group in groups for i in group.members) == sorted(
                request for node in nodes_of(root) for request in node.requests
            )


def alike(random, count, longest=14):
    """Prompts that share prefixes of many lengths."""
    stems = [[random.randrange(VOCAB) for _ in range(longest)] for _ in range(3)]
    return [
        (random.choice(stems)[: random.randrange(longest)] + [random.randrange(3) for _ in range(random.randint(0, 5))])
        or [1]
        for _ in range(count)
    ]


def test_the_tree_has_all_shared_beginnings_and_no_others():
    random = Random(1)
    for _ in range(100):
        size = random.randint(1, 4)
        prompts = alike(random, random.randint(1, 12))
        heads = [[tuple(p[: i * size]) for i in range(1, (len(p) - 1) // size + 1)] for p in prompts]
        common = [set(a) & set(b) for a, b in combinations(heads, 2)]
        depths = sorted({max(both, key=len) for both in common if both}, key=lambda head: (len(head), head))
        nodes = nodes_of(prefix_tree(prompts, size))[1:]
        assert sorted(node.depth * size for node in nodes) == [len(head) for head in depths]
        for node in nodes:
            members = [i for below in nodes_of(node) for i in below.requests]
            assert len(members) >= 2 and len({tuple(prompts[i][: node.depth * size]) for i in members}) == 1


def test_the_plan_is_the_best_there_is_for_random_prompts_in_whole_blocks():
    random = Random(2)
    for _ in range(60):
        size, prompts = random.randint(1, 4), alike(random, random.randint(1, 9))
        planned = plan(prompts, [1] * len(prompts), size)
        assert planned.saved_tokens == brute_force(prefix_tree(prompts, size)) * size
        for group in planned.groups:
            assert (len(group.members) > 1) == (group.num_blocks > 0)
            assert len({tuple(prompts[i][: group.num_blocks * size]) for i in group.members}) == 1
            assert all(len(prompts[i]) > group.num_blocks * size for i in group.members)


def test_neither_all_instructions_nor_all_documents_is_right():
    shared, rare, often = list(range(100, 132)), list(range(8)), list(range(50, 90))
    prompts = [shared + rare + [200 + i] for i in range(2)] + [shared + [400 + i] * 9 for i in range(6)]
    assert plan(prompts, [1] * 8, 8).saved_tokens == 7 * 32  # a document of only two questions saves too little
    prompts += [shared + often + [300 + i] for i in range(10)]
    assert plan(prompts, [1] * 18, 8).saved_tokens == 7 * 32 + 9 * 72


def test_groups_that_decode_most_for_what_they_compute_come_first():
    long, short = [1] * 40, [2] * 8
    prompts = [long + [3], short + [4], long + [5], short + [6], [7] * 5]
    planned = plan(prompts, [10, 10, 10, 10, 30], 4)
    assert [group.members for group in planned.groups] == [[4], [1, 3], [0, 2]]
    assert planned.saved_tokens == 40 + 8


def test_the_last_token_is_never_shared_and_a_prompt_may_be_all_there_is():
    assert plan([[1] * 8] * 3, [1] * 3, 4).saved_tokens == 2 * 4
    assert plan([[1] * 4] * 3, [1] * 3, 4).saved_tokens == 0
    assert plan([[1, 2, 3]], [1], 4).groups == [([0], 0)]
    assert plan([], [], 4) == ([], 0)


def test_thousands_of_levels_are_no_problem():
    deep = plan([[1] * length for length in range(2, 1102)], [1] * 1100, 1)  # deeper than Python's stack
    assert deep.saved_tokens > 500_000
    assert plan([[1] * 50_000] * 2, [1, 1], 1).saved_tokens == 49_999


# --- the engine -----------------------------------------------------------------------------------------------


class Batch:
    """A batch on an engine, with all invariants checked after each step."""

    def __init__(self, engine, items):
        self.engine, self.items, self.events, self.state, self.done = engine, items, [], State(), {}
        self.cut = set()  # ids of requests that outgrew the pool
        self.state.apply(engine.started_event())
        engine.events.subscribe(self.listen)
        outgrow = engine.scheduler.outgrow

        def watched(request, plan):
            before = len(request.live)
            outgrow(request, plan)
            if len(request.live) < before:
                self.cut.add(request.request_id)

        engine.scheduler.outgrow = watched
        self.predicted = engine.add_batch(items)

    def listen(self, event):
        self.events.append(event)
        self.state.apply(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def step(self):
        for output in self.engine.step():
            if output.finished:
                self.done[output.request_id] = output
        self.engine.check()
        memory, groups = self.engine.memory, running_groups(self.engine)
        kept = {number: [hit.block for hit in hits] for number, hits in groups.kept.items()}
        assert kept == {number: group.kept for number, group in self.state.groups.items() if group.kept}
        assert self.state.ref_counts == memory.pool.ref_counts
        assert self.state.running == [request.request_id for request in self.engine.scheduler.running]

    def run(self):
        for _ in range(5000):
            if not self.engine.has_unfinished():
                break
            self.step()
        assert not self.engine.has_unfinished(), "the engine does not finish"
        groups = running_groups(self.engine)
        assert not groups.kept and not self.state.groups and not groups.group_of
        assert self.engine.memory.pool.num_free == self.engine.num_blocks
        return self

    @property
    def saved(self):
        first = {}
        for event in self.of(Admitted):
            first.setdefault(event.request_id, event.num_cached)
        return sum(first.get(item.request_id, 0) for item in self.items)

    @property
    def gave_way(self):
        """Whether a group's prefix was released before the group ended."""
        pairs = zip(self.events, self.events[1:], strict=False)
        return any(isinstance(one, PrefixReleased) and not isinstance(then, GroupEnded) for one, then in pairs)


def tokens(output):
    return [list(one.token_ids) for one in output.outputs]


def alone(item, max_len):
    if item.params.beam_width:
        return unbatched_beams(item.prompt_token_ids, item.params, max_len)
    return [unbatched(item.prompt_token_ids, item.params, n, max_len) for n in range(item.params.n)]


def random_params(random):
    if random.random() < 0.1:
        return SamplingParams(temperature=0, beam_width=2, n=2, max_tokens=random.randint(1, 8))
    n = random.choice((1, 1, 1, 2))
    return SamplingParams(n=n, max_tokens=random.randint(1, 14), ignore_eos=random.random() < 0.5)


def test_random_batches_in_pools_that_are_too_small():
    """Tokens are those of single runs, and savings those predicted unless a request needs a whole group's memory."""
    seen = {"exact": 0, "saved": 0, "gave way": 0, "preempted": 0, "cut": 0}
    for seed in range(100):
        random = Random(seed)
        size = random.randint(1, 6)
        settings = {"preemption": "swap", "swap_blocks": random.randint(1, 20)} if random.random() < 0.4 else {}
        engine = fake_engine(
            block_size=size, num_blocks=max(4, random.randint(18, 60) // size), max_num_seqs=random.randint(2, 4),
            max_num_batched_tokens=random.randint(4, 20), max_model_len=random.randint(30, 70), **settings,
        )  # fmt: skip
        prompts = alike(random, random.randint(1, 14))
        items = [BatchItem(str(i), prompt, random_params(random)) for i, prompt in enumerate(prompts)]
        try:
            batch = Batch(engine, items)
        except InvalidRequest:  # larger than the pool: no request has started
            assert not engine.has_unfinished()
            continue
        batch.step()
        for i in range(random.randint(0, 2)):
            engine.add_request(f"stranger-{i}", prompts[0], SamplingParams(max_tokens=20, ignore_eos=True))
        batch.run()
        for item in items:
            if item.request_id not in batch.cut:
                assert tokens(batch.done[item.request_id]) == alone(item, engine.max_model_len), (seed, item)
        if not batch.gave_way and not batch.cut:
            assert batch.saved == batch.predicted, seed
            seen["exact"] += 1
            seen["saved"] += batch.predicted > 0
        seen["gave way"] += batch.gave_way
        seen["preempted"] += bool(batch.of(Preempted))
        seen["cut"] += bool(batch.cut)
    assert min(seen.values()) >= 5, seen


def family(count=6, shared=12, max_tokens=6, first=30):
    """Requests whose prompts share ``shared`` tokens."""
    stem = [first - shared + i for i in range(shared)]
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [BatchItem(f"{first}-{i}", [*stem, 40 + i], params) for i in range(count)]


def test_a_group_shares_its_blocks_while_it_lives_and_they_are_free_when_it_ends():
    batch = Batch(fake_engine(num_blocks=64), family())
    assert batch.predicted == 5 * 12
    batch.step()
    (group,) = batch.state.groups.values()
    assert batch.state.running == ["30-0"] and group.num_blocks == 3 == len(group.kept)  # the others wait for it
    batch.step()
    assert len(batch.state.running) == 6
    assert [batch.engine.memory.pool.ref_counts[block] for block in group.kept] == [7] * 3
    kept = list(group.kept)
    batch.run()
    assert batch.saved == batch.predicted
    (released,) = batch.of(PrefixReleased)
    assert released.blocks == kept[::-1] and isinstance(batch.events[batch.events.index(released) + 1], GroupEnded)


def test_the_first_may_end_before_the_others_begin():
    batch = Batch(fake_engine(num_blocks=64), family(max_tokens=1))
    batch.step()
    assert batch.done.keys() == {"30-0"} and not batch.state.running
    assert batch.engine.memory.pool.num_free == 64 - 3
    assert batch.engine.held().token == 12  # in use, though no block table contains them
    assert batch.run().saved == batch.predicted == 5 * 12


def test_a_group_that_waits_lets_others_pass():
    strangers = [BatchItem(f"s{i}", [i] * 9, SamplingParams(max_tokens=2)) for i in (1, 2)]
    batch = Batch(fake_engine(num_blocks=64, max_num_batched_tokens=64), [*family(max_tokens=30), *strangers])
    batch.step()
    assert [event.request_id for event in batch.of(Admitted)] == ["30-0", "s1", "s2"]
    batch.run()


def test_memory_and_not_the_number_of_sequences_limits_a_batch():
    work = [*family(count=10, max_tokens=40), *family(count=10, max_tokens=40, first=20)]
    batch = Batch(fake_engine(num_blocks=300, max_num_seqs=4, max_num_batched_tokens=8), work)
    for _ in range(12):
        batch.step()
    assert len(batch.state.running) == 20
    batch.engine.add_request("stranger", [1, 2], SamplingParams(max_tokens=2))
    batch.step()
    assert "stranger" in batch.state.running
    assert {event.seq_id for event in batch.events if event.type == "sampled"} >= set(range(20))
    batch.run()
    assert not batch.of(Preempted)


def test_others_are_counted_as_ever():
    batch = Batch(fake_engine(num_blocks=200, max_num_seqs=2), family(max_tokens=30))
    for i in range(4):
        batch.engine.add_request(f"stranger-{i}", [i], SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(4):
        batch.step()
    running = batch.state.running
    assert sum(name.startswith("stranger") for name in running) == 2 and len(running) == 8
    batch.run()


def test_what_is_kept_gives_way_before_somebody_ends_early():
    """A request outside the group needs the whole pool and gets it; the group recomputes its prefix."""
    engine = fake_engine(num_blocks=10, block_size=4, max_num_batched_tokens=64)
    long = SamplingParams(max_tokens=18, ignore_eos=True)
    batch = Batch(engine, family(count=3, shared=12, max_tokens=1))
    engine.add_request("stranger", [9] * 20, long)
    batch.run()
    assert batch.gave_way and not batch.cut and batch.saved < batch.predicted
    assert tokens(batch.done["stranger"]) == [unbatched([9] * 20, long, 0, 200)]
    for item in batch.items:
        assert tokens(batch.done[item.request_id]) == alone(item, 200)


def test_aborting_members_and_leaders_leaves_nothing_behind():
    for victims in (["30-0"], ["30-3"], ["30-0", "30-1"], [f"30-{i}" for i in range(6)]):
        for after in (0, 1, 2):
            batch = Batch(fake_engine(num_blocks=64), family())
            for _ in range(after):
                batch.step()
            for victim in victims:
                batch.engine.abort(victim)
                batch.engine.check()
            batch.run()
            assert set(batch.done) == {item.request_id for item in batch.items} - set(victims)


def test_a_step_that_fails_takes_the_leader_and_not_the_group():
    batch = Batch(fake_engine(num_blocks=64), family())
    execute = batch.engine.runner.execute

    def failing(plan):
        batch.engine.runner.execute = execute
        raise RuntimeError("a kernel failed")

    batch.engine.runner.execute = failing
    with pytest.raises(Exception, match="a kernel failed"):
        batch.engine.step()
    assert not running_groups(batch.engine).kept
    batch.run()
    assert set(batch.done) == {f"30-{i}" for i in range(1, 6)} and batch.saved == 4 * 12


def test_all_logits_of_a_prompt_need_all_of_it():
    first, *rest = family(count=3)
    items = [first._replace(params=SamplingParams(prompt_logprobs=0, max_tokens=2)), *rest]
    engine = fake_engine(num_blocks=64)

    def sampler(contexts, plan):
        return fake_sampler([c for c, chunk in zip(contexts, plan.chunks, strict=True) if chunk.samples], plan)

    engine.sampler = sampler
    assert engine.add_batch(items) == 12  # only the other two share their prefix
    while engine.has_unfinished():
        engine.step()
        engine.check()


def test_nothing_but_the_group_s_beginning_is_taken_from_the_cache():
    """So the savings are those planned, independent of earlier requests."""
    engine = fake_engine(num_blocks=64)
    assert Batch(engine, family()).run().saved == 5 * 12
    again = Batch(engine, [item._replace(request_id=f"again-{item.request_id}") for item in family()])
    assert again.run().saved == again.predicted == 5 * 12


def test_seeds_that_nobody_gave_are_those_of_one_request_after_the_other():
    draws = []
    for batch in (True, False):
        engine = fake_engine(num_blocks=64, seed=3)
        engine.sampler = lambda contexts, plan: [
            SampledToken(int(seq.rng.random() * VOCAB)) for chunk in plan.chunks for seq in chunk.samples
        ]
        items = [item._replace(params=SamplingParams(n=2, max_tokens=4)) for item in [*family(3), *family(3, first=20)]]
        items[1] = items[1]._replace(params=SamplingParams(seed=7, max_tokens=4))
        if batch:
            engine.add_batch(items[::-1])
        else:
            for item in items[::-1]:
                engine.add_request(*item[:3])
        done = {}
        while engine.has_unfinished():
            done |= {out.request_id: tokens(out) for out in engine.step() if out.finished}
        draws.append(done)
    assert draws[0] == draws[1]


# --- rejected requests and settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "orca-max"},
        {"memory": "vattention"},
        {"enable_prefix_caching": False},
        {"batching": "static"},
    ],
)
def test_an_engine_that_cannot_share_says_so(settings):
    engine = fake_engine(num_blocks=64, **settings)
    with pytest.raises(InvalidConfig, match='needs memory="paged"'):
        engine.add_batch(family())
    assert not engine.has_unfinished()
    EngineConfig(**settings).check_schedule("fcfs")


def test_a_scheduler_without_groups_says_so():
    engine = fake_engine(num_blocks=64)
    engine.scheduler = SimpleNamespace(running=[], waiting=[])  # another scheduler, without an admission policy
    with pytest.raises(InvalidConfig, match="SimpleNamespace"):
        engine.add_batch(family())


@pytest.mark.parametrize(
    "bad",
    [
        BatchItem("bad", [], SamplingParams()),
        BatchItem("bad", [1, VOCAB], SamplingParams()),
        BatchItem("bad", [1, [2]], SamplingParams()),
        BatchItem("bad", [1] * 500, SamplingParams()),
        BatchItem("30-0", [1], SamplingParams()),
        BatchItem("", [1], SamplingParams()),
        BatchItem("bad", [1], None),
    ],
)
def test_one_bad_request_and_nothing_is_begun(bad):
    engine = fake_engine(num_blocks=64)
    seen = []
    engine.events.subscribe(seen.append)
    with pytest.raises(InvalidRequest):
        engine.add_batch([*family(), bad])
    assert not seen and not engine.has_unfinished() and not running_groups(engine).group_of
    engine.add_batch([])  # nothing to do, and no error
    assert not engine.has_unfinished()


def test_events_tell_who_is_in_a_group():
    batch = Batch(fake_engine(num_blocks=64), family(3))
    (started,) = batch.of(GroupStarted)
    assert started.request_ids == ["30-0", "30-1", "30-2"] and started.num_blocks == 3
    batch.run()
    assert len(batch.of(PrefixKept)) == len(batch.of(PrefixReleased)) == len(batch.of(GroupEnded)) == 1
