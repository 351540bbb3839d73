"""vAttention's bookkeeping without a model: a fake store knows each slot's mapped pages, and reads only those."""

from collections import Counter
from random import Random

import pytest

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.block_table import Demand
from minipaged.core.plan import Chunk, StepPlan, Write
from minipaged.core.request import Request, Sequence
from minipaged.errors import InvariantViolation, StepFailed
from minipaged.events import EventLog, Scheduled
from minipaged.features.vattention.virtual_tables import PageMap, VirtualTables
from tests import test_fuzz
from tests.fake import EOS, VOCAB, FakeRunner, fake_sampler, unbatched

# --- the fake store ----------------------------------------------------------------------------------------------


class FakeVirtualRunner(FakeRunner):
    """Reads contexts through the slots. Background maps happen as late as possible."""

    def __init__(self, block_size, num_blocks, swap_blocks):
        super().__init__(block_size, num_blocks, swap_blocks)
        self.shows: dict[tuple[int, int], int] = {}  # (slot, logical) → page
        self.ahead = None
        self.seen: Counter[str] = Counter()
        self.fail_after = None  # number of maps before a failure

    def execute(self, plan):
        if plan.maps is not None:
            self.remap(plan.maps)
            assert len(set(plan.maps.slots.values())) == len(plan.maps.slots), "two sequences in one slot"
        self.slots = plan.maps.slots if plan.maps else {}
        return super().execute(plan)

    def remap(self, maps):
        if self.ahead is not None:
            late, self.ahead = self.ahead, None
            self.apply(late.ahead_unmaps, late.ahead, "ahead")
        self.apply(maps.unmaps, maps.maps, "needed")
        if maps.background:
            self.ahead = maps
        else:
            self.apply(maps.ahead_unmaps, maps.ahead, "ahead")
        maps.done = True

    def apply(self, unmaps, maps, why):
        for slot, logical, page in unmaps:
            assert self.shows.pop((slot, logical)) == page
            self.seen["unmapped"] += 1
        for slot, logical, page in maps:
            if self.fail_after is not None:
                self.fail_after -= 1
                if self.fail_after < 0:
                    raise OSError("no more mappings")
            self.seen[why] += 1
            self.seen["aliased"] += page in self.shows.values()
            self.shows[slot, logical] = page

    def _read(self, chunk):
        slot = self.slots[chunk.seq.seq_id]
        seen = [self.shows[slot, logical] for logical in range(len(chunk.block_table))]
        assert seen == chunk.block_table
        return super()._read(chunk)


def virtual_engine(**settings):
    defaults = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    settings = defaults | {"max_model_len": 200} | settings | {"memory": "vattention"}
    config = EngineConfig(model="fake", **settings)
    runner = FakeVirtualRunner(config.block_size, config.num_blocks, config.swap_space(config.num_blocks))
    return assemble(config, runner, fake_sampler, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}))


def run(engine, *prompts, **params):
    """Runs all prompts together to their end. Returns their tokens."""
    params = {"max_tokens": 8, "ignore_eos": True} | params
    names = [f"{engine.scheduler.step}/{i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, SamplingParams(**params))
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check()
    return [[out.token_ids for out in done[name].outputs] for name in names]


# --- fuzz --------------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch):
    """The fuzz test's traces, run on vAttention."""

    def fake_engine(**settings):
        return virtual_engine(**settings, mapping=Random(str(settings)).choice(("sync", "eager", "async")))

    monkeypatch.setattr(test_fuzz, "fake_engine", fake_engine)
    return test_fuzz.Trace


@pytest.mark.parametrize("part", range(3))
def test_random_traces_read_every_token_through_the_slot_of_its_sequence(traces, part):
    totals: Counter[str] = Counter()
    for seed in range(part * 400, (part + 1) * 400):
        trace = traces(seed)
        try:
            totals += trace.run() + trace.engine.runner.seen
        except Exception as error:
            error.add_note(f"trace {seed}")
            raise
    rare = ["preempted", "swapped_in", "copied", "forked", "cached", "evicted", "searched", "forked by hand"]
    rare += ["unmapped", "needed", "ahead", "aliased"]
    assert not [name for name in rare if totals[name] < 20], totals


def schedule_of(mapping, seed):
    """The schedule and the outputs of a random run: tokens computed by request and step, and generated tokens."""
    random = Random(seed)
    kind = {} if mapping is None else {"memory": "vattention", "mapping": mapping}
    settings = {
        "num_blocks": random.randint(8, 20), "block_size": random.randint(1, 6), "max_num_seqs": 5,
        "max_num_batched_tokens": 20, "max_model_len": 60, "enable_prefix_caching": random.random() < 0.5,
        "preemption": random.choice(("swap", "recompute")),
    }  # fmt: skip
    config = EngineConfig(model="fake", **settings, **kind)
    runner = (FakeRunner if mapping is None else FakeVirtualRunner)(
        config.block_size, config.num_blocks, config.swap_space(config.num_blocks)
    )
    engine = assemble(config, runner, fake_sampler, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}))
    lines: list = []
    engine.events.subscribe(lambda event: lines.append(event) if isinstance(event, Scheduled) else None)
    for i in range(6):
        prompt = [1, 2, 1, 2, 1][: random.randint(1, 5)] + [random.randrange(VOCAB)]
        engine.add_request(f"r{i}", prompt, SamplingParams(n=random.choice((1, 2)), max_tokens=random.randint(1, 20)))
        lines += engine.step()
    while engine.has_unfinished():
        lines += engine.step()
    return lines


@pytest.mark.parametrize("seed", range(40))
def test_mapping_decides_nothing(seed):
    """Pages mapped ahead stay free, so schedule and tokens are those of paging in every mapping mode."""
    paged = schedule_of(None, seed)
    assert paged == schedule_of("sync", seed) == schedule_of("eager", seed) == schedule_of("async", seed)


# --- the rules, one by one ---------------------------------------------------------------------------------------


class Books:
    """A memory manager without an engine, and the store that executes its maps."""

    def __init__(self, num_blocks=16, max_num_seqs=4, mapping="sync", **settings):
        options = {"max_model_len": 40, "enable_prefix_caching": False} | settings
        self.memory = VirtualTables(num_blocks, 4, EventLog(), max_num_seqs=max_num_seqs, mapping=mapping, **options)
        self.store = FakeVirtualRunner(4, num_blocks, 0)
        self.lengths: dict[int, int] = {}

    def step(self, **ends):
        """Runs a step: ``s1=12`` computes sequence 1 up to token 12. Returns the step's maps."""
        plan = StepPlan(0)
        for name, end in ends.items():
            seq_id = int(name[1:])
            start = self.lengths.get(seq_id, 0)
            if seq_id not in self.memory.tables:
                self.memory.open(seq_id, [], Demand([end], end, end, 1))
            self.memory.reserve(Write(seq_id, start, end))
            seq = Sequence(seq_id, list(range(end)), end, Random())
            request = Request.__new__(Request)
            plan.chunks.append(Chunk(request, seq, start, end - start, [seq], self.memory.tables[seq_id]))
            self.lengths[seq_id] = end
        self.memory.map_slots(plan)
        self.store.remap(plan.maps)
        self.memory.check()
        return plan.maps

    def free(self, seq_id):
        self.memory.free(seq_id)
        del self.lengths[seq_id]
        self.memory.check()


def test_a_growing_sequence_maps_one_page_group_at_a_time():
    books = Books()
    assert books.step(s1=4).maps == [PageMap(0, 0, 0)]
    assert books.step(s1=5).maps == [PageMap(0, 1, 1)]
    assert books.step(s1=6).maps == books.step(s1=7).maps == []
    assert books.step(s1=20).maps == [PageMap(0, logical, logical) for logical in (2, 3, 4)]


def test_pages_of_a_freed_slot_stay_mapped_and_the_next_sequence_takes_them_in_place():
    books = Books()
    books.step(s1=12)
    books.free(1)
    assert len(books.store.shows) == 3, "deferred reclamation"
    maps = books.step(s2=12)
    assert (maps.maps, maps.unmaps) == ([], [])
    assert books.memory.tables[2] == [0, 1, 2]


def test_of_the_idle_slots_the_best_fit_is_reused():
    books = Books(max_num_seqs=4)
    books.step(s1=8, s2=16, s3=12)  # slots with 2, 4 and 3 page-groups
    for seq_id in (1, 2, 3):
        books.free(seq_id)
    assert books.step(s4=11).slots[4] == 2, "the best fit is reused"
    assert books.step(s5=4).slots[5] == 0
    maps = books.step(s6=20)
    assert maps.slots[6] == 1, "none has enough, so the largest is reused"
    assert [m.logical for m in maps.maps] == [4]


def test_unmapped_pages_are_used_up_before_any_is_reclaimed_from_an_idle_slot():
    books = Books(num_blocks=6, max_num_seqs=3)
    books.step(s1=4, s2=8)
    books.free(2)
    maps = books.step(s1=8)  # pages 3, 4, 5 are unmapped
    assert (maps.unmaps, [m.page for m in maps.maps]) == ([], [3])
    assert [m.page for m in books.step(s1=16).maps] == [4, 5]
    maps = books.step(s1=20)
    (reclaimed,) = maps.unmaps
    assert reclaimed.slot == 1 and reclaimed.page in (1, 2)
    assert maps.maps == [PageMap(0, 4, reclaimed.page)]


def test_a_page_that_lost_its_last_place_is_handed_out_before_mapped_ones():
    books = Books(num_blocks=5, max_num_seqs=2)
    books.step(s1=8)
    books.memory.fork(1, 2)
    books.lengths[2] = 8
    books.step(s2=8)  # no copy, as 8 tokens fill the blocks; both slots show pages 0 and 1
    assert books.store.seen["aliased"] == 2
    books.free(1)
    books.free(2)
    maps = books.step(s3=20)  # reuses one slot's pages in place, and takes all others
    assert {m.page for m in maps.maps} == {2, 3, 4} and not maps.unmaps


@pytest.mark.parametrize("mapping", ["eager", "async"])
def test_whoever_fills_its_block_has_the_next_one_mapped_already(mapping):
    books = Books(mapping=mapping)
    books.step(s1=3)
    maps = books.step(s1=4)
    (ahead,) = maps.ahead
    assert (ahead.slot, ahead.logical, maps.background) == (maps.slots[1], 1, mapping == "async")
    free = books.memory.pool.num_free
    maps = books.step(s1=5)
    assert maps.maps == [] and books.memory.tables[1][1] == ahead.page
    assert books.memory.pool.num_free == free - 1, "the page is allocated only now"


def test_a_page_mapped_ahead_goes_to_whoever_needs_it_first():
    books = Books(num_blocks=3, max_num_seqs=2, mapping="eager")
    books.step(s1=4, s2=1)
    assert books.memory.mapped[0] == [0, 2], "the last free page is mapped ahead for sequence 1"
    maps = books.step(s2=5)
    assert maps.unmaps == [PageMap(0, 1, 2)] and maps.maps == [PageMap(1, 1, 2)]


def test_a_chunk_of_a_prompt_has_the_next_chunk_mapped_ahead():
    books = Books(mapping="async")
    plan = StepPlan(0)
    books.memory.open(1, [], Demand([12], 12, 12, 1))
    books.memory.reserve(Write(1, 0, 8))
    seq = Sequence(1, list(range(12)), 12, Random())
    plan.chunks.append(Chunk(Request.__new__(Request), seq, 0, 8, [], books.memory.tables[1]))
    books.memory.map_slots(plan)
    needed = [m.logical for m in plan.maps.ahead if m.slot == plan.maps.slots[1]]
    assert needed == [2, 3], "the rest of the prompt, and the first token after it"


def test_an_idle_slot_is_stocked_for_a_prompt_like_the_last():
    books = Books(mapping="eager", max_num_seqs=2, num_blocks=20)
    assert [m for m in books.step(s1=23).ahead if m.slot == 1] == [PageMap(1, i, 6 + i) for i in range(4)]
    assert [m.logical for m in books.step(s1=24).ahead if m.slot == 1] == [4, 5]
    maps = books.step(s2=24)
    assert maps.slots[2] == 1 and maps.maps == []


def test_nothing_is_mapped_ahead_beyond_the_end_of_a_slot():
    books = Books(mapping="eager", max_num_seqs=1, num_blocks=12)
    assert books.step(s1=40).ahead == []  # max_model_len


def test_a_prefix_hit_and_a_fork_show_one_page_in_two_slots():
    engine = virtual_engine(mapping="sync")
    prompt = list(range(1, 18))
    engine.add_request("a", prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add_request("b", prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    shows, slots = engine.runner.shows, engine.memory.slots
    assert len(slots) == 2
    first, second = ([shows[slot, i] for i in range(4)] for slot in slots.values())
    assert first == second, "four full blocks of the prompt, at the same logical index"
    engine.fork("a")
    engine.step()
    assert len(slots) == 3 and [shows[list(slots.values())[2], i] for i in range(4)] == first


def test_a_prefix_found_where_it_still_is_mapped_costs_no_mapping():
    engine = virtual_engine(mapping="sync")
    prompt = list(range(1, 14))
    run(engine, prompt)
    before = engine.runner.seen["needed"]
    run(engine, prompt)
    assert engine.runner.seen["needed"] - before <= 2, "3 of the 6 blocks are found, and one more is free in place"


@pytest.mark.parametrize("mapping", ["sync", "eager", "async"])
@pytest.mark.parametrize("fail_after", range(0, 18, 3))
def test_after_a_failed_mapping_nobody_reads_what_was_not_mapped(mapping, fail_after):
    engine = virtual_engine(mapping=mapping, max_num_seqs=4)
    prompts = {f"r{i}": [i] * (5 + 3 * i) for i in range(3)}
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    engine.runner.fail_after = fail_after
    done, failed = {}, 0
    while engine.has_unfinished():
        try:
            outputs = engine.step()
        except StepFailed as error:
            outputs, failed = error.outputs, failed + 1
            assert failed == 1, "a later mapping failed because a failed one was recorded as done"
            engine.runner.fail_after = None
            engine.runner.ahead = None
            engine.runner.shows.clear()  # the worst case: none of the recorded maps exists
            engine.add_request("late", [9, 9, 9], params)
            prompts["late"] = [9, 9, 9]
        engine.check()
        done |= {output.request_id: output for output in outputs if output.finished}
    assert failed == 1
    for name, output in done.items():
        (out,) = output.outputs
        truth = unbatched(prompts[name], params, 0, engine.max_model_len)
        assert out.token_ids == truth[: len(out.token_ids)]
        assert out.finish_reason == "abort" or out.token_ids == truth


def test_the_check_finds_books_that_disagree():
    def broken(change):
        books = Books()
        books.step(s1=8, s2=4)
        change(books.memory)
        with pytest.raises(InvariantViolation) as error:
            books.memory.check()
        return str(error.value)

    def swap_slots(memory):
        memory.slots[1], memory.slots[2] = memory.slots[2], memory.slots[1]

    def lose_place(memory):
        memory._places[0].clear()

    def extra_place(memory):
        memory._places[9].add((3, 0))

    def wrong_page(memory):
        memory._show(0, 0, 7)

    assert "owned by" in broken(swap_slots)
    assert "has no record" in broken(lose_place)
    assert "not mapped" in broken(extra_place)
    assert "slot 0 shows [7, 1]" in broken(wrong_page)
