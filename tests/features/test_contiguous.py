"""Contiguous KV memory in the engine: when it reserves which slots, what forks cost, and the paper's numbers."""

from collections import Counter
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.block_table import Demand
from minipaged.core.plan import Write
from minipaged.errors import BlockError, InvalidConfig, InvalidRequest
from minipaged.events import Recorder, State
from minipaged.events.waste import AHEAD, Held, Progress, timeline
from minipaged.features.contiguous.contiguous_tables import ContiguousTables
from tests.fake import fake_engine, unbatched, unbatched_beams

EVERY = ("paged", *AHEAD)


def params(max_tokens, **settings):
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings)


def run(engine, after_step=lambda: None):
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            done[output.request_id] = output
        engine.check()
        after_step()
    return done


def papers_pool(memory, **settings):
    """12 GB of KV cache on an A100: 15,728 slots for OPT-13B."""
    sizes = {"num_blocks": 983, "block_size": 16, "max_model_len": 2048, "max_num_seqs": 64}
    return fake_engine(**sizes, max_num_batched_tokens=2048, memory=memory, **settings)


# --- the paper's numbers ----------------------------------------------------------------------------------------


def test_max_runs_exactly_seven_requests_in_the_papers_pool_and_leaves_8_85_percent():
    engine = papers_pool("orca-max")
    for i in range(20):
        engine.add_request(f"r{i}", [i] * (10 + i), params(30))
    engine.step()
    assert [request.request_id for request in engine.scheduler.running] == [f"r{i}" for i in range(7)]
    held = engine.held()
    assert engine.memory.pool.num_free * 16 == held.external == 1392
    assert held.external / 15_728 == pytest.approx(0.0885, abs=5e-5)
    assert held.total == 15_728
    assert held.token == sum(10 + i for i in range(7)) and held.reserved == 7 * 29
    sizes = []
    run(engine, lambda: sizes.append(len(engine.scheduler.running)))
    assert max(sizes) == 7


def test_what_is_free_is_external_only_while_somebody_waits_for_it():
    engine = papers_pool("orca-max")
    for i in range(7):
        engine.add_request(f"r{i}", [i], params(30))
    engine.step()
    assert engine.held().external == 0 and engine.held().total == 7 * 2048
    engine.add_request("one more", [9], params(30))
    assert engine.held().external == 1392


@pytest.mark.parametrize(
    "memory, blocks, held",
    [
        # 10 prompt tokens and 25 output tokens, the last of which needs no slot: 34 slots. Blocks of 4.
        ("orca-max", 50, Held(10, 24, 200 - 34, 0)),
        ("orca-pow2", 16, Held(10, 24, 42 - 34, 64 - 42)),
        ("orca-oracle", 16, Held(10, 24, 0, 64 - 34)),
        ("paged", 3, Held(10, 2, 0, 0)),
    ],
)
def test_what_one_request_holds(memory, blocks, held):
    engine = fake_engine(memory=memory, num_blocks=64)
    engine.add_request("a", [1] * 10, params(25))
    engine.step()
    ((_, table),) = engine.block_tables().items()
    assert engine.held() == held and len(table) == blocks and table == list(range(blocks))
    assert held.total == blocks * 4
    run(engine)
    assert engine.held() == Held() and engine.memory.pool.num_free == 64


# --- the prediction and the engine agree ------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("memory", EVERY)
def test_the_prediction_from_events_is_what_the_engine_holds(memory, block_size):
    """The counts agree in every step and class of waste; while requests wait, free slots count as external waste."""
    caching = {"enable_prefix_caching": False} if memory == "paged" else {}
    blocks = 560 // block_size
    engine = fake_engine(memory=memory, block_size=block_size, num_blocks=blocks, max_model_len=150, **caching)
    recorder, random, measured, waited = Recorder(), Random(1), [], 0
    recorder(engine.started_event())
    engine.events.subscribe(recorder)
    for i in range(16):
        engine.add_request(f"r{i}", [i] * random.randint(1, 60), params(random.randint(1, 60)))
    while engine.has_unfinished():
        engine.step()
        free = engine.memory.pool.num_free * block_size
        held = engine.held()
        assert held.total + free == blocks * block_size or held.total == blocks * block_size
        if held.total + free > blocks * block_size:  # free slots were counted as external waste
            held, waited = held._replace(external=held.external - free), waited + 1
        measured.append(held)
    rows = timeline(recorder.events)
    assert [row.held[memory] for row in rows] == measured
    assert memory == "paged" or waited, "the pool was meant to be too small"


def test_the_prediction_does_not_depend_on_the_manager_that_ran():
    def rows(memory):
        caching = {"enable_prefix_caching": False} if memory == "paged" else {}
        engine, recorder = fake_engine(memory=memory, num_blocks=2000, **caching), Recorder()
        recorder(engine.started_event())
        engine.events.subscribe(recorder)
        for i in range(6):
            engine.add_request(f"r{i}", [i] * (3 * i + 1), params(5 * i + 1))
        run(engine)
        return timeline(recorder.events)

    assert rows("paged") == rows("orca-max") == rows("orca-pow2") == rows("orca-oracle")


# --- admission --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", AHEAD)
def test_first_come_first_served_even_if_a_later_one_would_fit(memory):
    engine = fake_engine(memory=memory, num_blocks=24, block_size=4, max_model_len=64, max_num_batched_tokens=200)
    for name, length in (("a", 40), ("b", 40), ("c", 1)):
        engine.add_request(name, [1] * length, params(2))
    engine.step()
    assert [request.request_id for request in engine.scheduler.running] == ["a"]
    assert memory == "orca-max" or engine.memory.pool.available(1) == 8, "c would fit"
    done = run(engine)
    assert done["c"].outputs[0].token_ids == unbatched([1], params(2), 0, 64)


@pytest.mark.parametrize("memory", AHEAD)
def test_nobody_is_ever_preempted_and_tables_never_grow(memory):
    engine = fake_engine(memory=memory, num_blocks=40, block_size=4, max_model_len=60)
    kinds: Counter[str] = Counter()
    engine.events.subscribe(lambda event: kinds.update([event.type]))
    for i in range(12):
        engine.add_request(f"r{i}", [i] * (1 + 3 * i), params(20))
    lengths: dict[int, set[int]] = {}

    def look():
        for seq_id, table in engine.block_tables().items():
            lengths.setdefault(seq_id, set()).add(len(table))
            assert table == list(range(table[0], table[0] + len(table)))

    done = run(engine, look)
    assert not kinds["preempted"] and not kinds["evicted"] and all(len(seen) == 1 for seen in lengths.values())
    for i in range(12):
        assert done[f"r{i}"].outputs[0].token_ids == unbatched([i] * (1 + 3 * i), params(20), 0, 60)


@pytest.mark.parametrize(
    "memory, prompt, settings, message",
    [
        ("orca-max", 30, {"n": 3}, r"50 neighbouring KV blocks for each of the request's 3 sequence\(s\).*room for 2"),
        ("orca-pow2", 100, {"n": 2}, "64 neighbouring.*room for 1"),
        ("orca-oracle", 4, {"beam_width": 7, "temperature": 0}, "16 neighbouring.*room for 6"),
    ],
)
def test_a_request_that_could_never_be_served_is_refused_at_the_door(memory, prompt, settings, message):
    engine = fake_engine(memory=memory, num_blocks=100, block_size=4, max_model_len=200)
    with pytest.raises(InvalidRequest, match=message):
        engine.add_request("a", [1] * prompt, params(40, **settings))
    assert not engine.has_unfinished()
    engine.add_request("a", [1], params(40))
    run(engine)


def test_max_promises_no_more_than_the_pool_and_refuses_what_would_outgrow_it():
    engine = fake_engine(memory="orca-max", num_blocks=10, block_size=4, max_model_len=200)
    with pytest.raises(InvalidRequest, match="lower max_tokens"):
        engine.add_request("a", [1] * 21, params(21))
    engine.add_request("a", [1] * 21, params(20))  # its last token needs no slot: 40 of 40
    assert len(run(engine)["a"].outputs[0].token_ids) == 20


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": True},
        {"preemption": "swap"},
        {"preemption": "swap", "swap_blocks": 4},
        {"eviction_policy": dict},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", AHEAD)
def test_what_contiguous_memory_cannot_do_is_refused(memory, settings):
    with pytest.raises(InvalidConfig, match="as they are by default"):  # not "set enable_prefix_caching=True"
        EngineConfig(memory=memory, **settings)


def test_the_prefix_cache_is_on_where_it_can_be():
    assert EngineConfig().caches_prefixes and EngineConfig(enable_prefix_caching=True).caches_prefixes
    assert not EngineConfig(enable_prefix_caching=False).caches_prefixes
    assert not EngineConfig(memory="orca-max").caches_prefixes
    assert EngineConfig(memory="orca-max", enable_prefix_caching=False).memory == "orca-max"


def test_the_first_event_names_the_manager():
    event = fake_engine(memory="orca-pow2", batching="static").started_event()
    assert (event.memory, event.batching, event.enable_prefix_caching) == ("orca-pow2", "static", False)


# --- forks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", AHEAD)
def test_a_fork_copies_the_whole_sequence_where_paging_copies_a_block(memory):
    def copies(memory):
        engine = fake_engine(memory=memory, num_blocks=100, block_size=4, max_model_len=64)
        state, seen = State(), Counter()
        state.apply(engine.started_event())
        engine.events.subscribe(lambda event: (state.apply(event), seen.update([event.type])))
        engine.add_request("a", [1] * 18, params(6, n=3))
        outputs = run(engine, lambda: state.ref_counts == engine.memory.pool.ref_counts or pytest.fail("wrong events"))
        outputs = outputs["a"].outputs
        assert [out.token_ids for out in outputs] == [unbatched([1] * 18, params(6), n, 64) for n in range(3)]
        return seen["copied"]

    assert copies("paged") == 2  # the prompt's last block, twice: the third writer is its only owner
    assert copies(memory) == 2 * 5  # all blocks of the prompt


@pytest.mark.parametrize("memory", AHEAD)
def test_beams_are_the_same_and_copy_more(memory):
    def search(memory):
        engine = fake_engine(memory=memory, num_blocks=150, block_size=4, max_model_len=80)
        seen: Counter[str] = Counter()
        engine.events.subscribe(lambda event: seen.update([event.type]))
        beams = SamplingParams(temperature=0, beam_width=4, n=4, max_tokens=24)
        engine.add_request("a", [3] * 17, beams)
        found = [out.token_ids for out in run(engine)["a"].outputs]
        assert found == unbatched_beams([3] * 17, beams, 80)
        assert engine.memory.pool.num_free == 150
        return seen["copied"]

    assert search(memory) > 3 * search("paged") > 0


def test_samples_that_end_give_their_chunks_back_and_beams_keep_theirs():
    engine = fake_engine(memory="orca-oracle", num_blocks=64, block_size=4, max_model_len=64)
    engine.add_request("a", [1] * 8, params(9, n=3))
    engine.step()
    chunk = 4
    assert engine.memory.pool.num_free == 64 - 3 * chunk, "chunks are reserved before samples fork"
    engine.step()
    (request,) = engine.scheduler.running
    engine.scheduler.finish(request, request.seqs[1], "stop")
    assert engine.memory.pool.num_free == 64 - 2 * chunk
    engine.check()
    run(engine)
    beams = SamplingParams(temperature=0, beam_width=3, max_tokens=9, ignore_eos=True)
    engine.add_request("b", [1] * 8, beams)
    free = set()
    while engine.has_unfinished():
        engine.step()
        engine.check()
        free.add(engine.memory.pool.num_free)
    assert free == {64 - 3 * chunk, 64}


@pytest.mark.parametrize("memory", AHEAD)
def test_a_fork_by_hand_takes_a_chunk_or_is_refused(memory):
    engine = fake_engine(memory=memory, num_blocks=32, block_size=4, max_model_len=64)
    engine.add_request("a", [1] * 30, params(20))
    for _ in range(4):
        engine.step()
    child = engine.fork("a")
    engine.check()
    with pytest.raises(InvalidRequest, match="no room for a copy"):
        engine.fork("a")
    engine.check()
    assert engine.memory.pool.num_free == 0
    done = run(engine)
    truth = unbatched([1] * 30, params(20), 0, 64)
    assert done["a"].outputs[0].token_ids == truth and done[child].outputs[0].token_ids == truth
    assert engine.memory.pool.num_free == 32


def test_whoever_was_forked_goes_on_where_its_parent_was_when_that_is_gone():
    engine, copied = fake_engine(memory="orca-oracle", num_blocks=64, block_size=4), []
    engine.events.subscribe(lambda event: copied.append(event) if event.type == "copied" else None)
    engine.add_request("a", [1] * 10, params(9))
    engine.step()
    (table,) = engine.block_tables().values()
    child = engine.fork("a")
    engine.abort("a")
    engine.check()
    engine.step()
    assert engine.block_tables() == {1: table} and not copied
    assert engine.memory.pool.num_free == 64 - len(table), "the chunk meant for the copy was not needed"
    done = run(engine)
    assert done[child].outputs[0].token_ids == unbatched([1] * 10, params(9), 0, 200)


# --- the block tables without an engine -------------------------------------------------------------------------


def test_an_owner_writes_in_place_behind_what_others_read():
    tables = ContiguousTables("orca-oracle", 16, 2, 32)
    tables.open(0, [], Demand([3, 3], 3, 3, 4))
    assert tables.reserve(Write(0, 0, 3)) == [] and tables.tables[0] == [0, 1, 2, 3]
    tables.mark_computed(0, [], 3)
    tables.fork(0, 1)
    assert tables.tables[1] == [0, 1], "only blocks with computed tokens"
    assert tables.reserve(Write(0, 3, 4)) == []
    assert tables.reserve(Write(1, 3, 4)) == [(0, 4), (1, 5)] and tables.tables[1] == [4, 5, 6, 7]
    tables.check()
    tables.free(0)
    assert tables.pool.num_free == 12
    tables.free(1)
    tables.check()
    assert tables.pool.num_free == 16


def test_misuse_is_an_error_at_the_call():
    tables = ContiguousTables("orca-oracle", 16, 2, 32)
    tables.open(0, [], Demand([3], 3, 3, 2))
    for misuse in (
        lambda: tables.open(0, [], Demand([3], 3, 3, 2)),
        lambda: tables.fork(0, 0),
        lambda: tables.free(7),
        lambda: tables.reserve(Write(0, 3, 9)),
    ):
        with pytest.raises(BlockError):
            misuse()
    tables.free(0)
    with pytest.raises(BlockError, match="twice"):
        tables.free(0)
    tables.check()


# --- any order of calls -----------------------------------------------------------------------------------------


class ContiguousMachine(RuleBasedStateMachine):
    """The model: ``tokens[seq_id]`` are a sequence's computed tokens, ``store[block]`` the content of a block's slots.

    A slot's content is the whole prefix that ends there, so that another sequence's content is detected at once.
    """

    @initialize(policy=st.sampled_from(AHEAD), block_size=st.integers(1, 5), blocks=st.integers(8, 60))
    def start(self, policy, block_size, blocks):
        self.size = block_size
        self.tables = ContiguousTables(policy, blocks, block_size, 24)
        self.store = [[None] * block_size for _ in range(blocks)]
        self.tokens: dict[int, list[int]] = {}
        self.limits: dict[int, int] = {}
        self.missing: dict[int, int] = {}  # lead → number of forks that were reserved at admission and are not made yet
        self.next_id = 0

    @rule(prompt=st.integers(1, 9), output=st.integers(1, 9), width=st.integers(1, 3), filled=st.booleans())
    def open(self, prompt, output, width, filled):
        demand = Demand([prompt] * width, prompt, prompt, output)
        free = self.tables.pool.num_free
        if not self.tables.fits(demand):
            assert self.tokens or self.tables.refusal(demand)
            return
        assert self.tables.refusal(demand) is None
        seq_id = self._new([], prompt + output - 1)
        self.tables.open(seq_id, [], demand)
        assert free - self.tables.pool.num_free == self.tables.blocks_to_hold(demand)
        self.missing[seq_id] = width - 1
        if filled:
            self._step([(seq_id, [0] * prompt)])

    @precondition(lambda self: self.tokens)
    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=4), new=st.lists(st.integers(0, 3), min_size=4))
    def append(self, picks, new):
        rows = {list(self.tokens)[pick % len(self.tokens)]: new[i : i + 1 + pick % 2] for i, pick in enumerate(picks)}
        self._step([(s, row[: self.limits[s] - len(self.tokens[s])]) for s, row in rows.items()])

    @precondition(lambda self: self.tokens)
    @rule(pick=st.integers(0, 99))
    def fork(self, pick):
        parent = list(self.tokens)[pick % len(self.tokens)]
        count = self.missing.pop(parent, 0)  # all forks reserved at admission, or one more
        if not count and not self.tables.prepare_fork(parent):
            return
        free = self.tables.pool.num_free
        for _ in range(max(1, count)):
            child = self._new(self.tokens[parent], self.limits[parent])
            self.tables.fork(parent, child)
        assert self.tables.pool.num_free == free

    @precondition(lambda self: self.tokens)
    @rule(pick=st.integers(0, 99))
    def free(self, pick):
        seq_id = list(self.tokens)[pick % len(self.tokens)]
        if self.missing.get(seq_id):
            return  # before its forks are made, a scheduler can only end the whole request
        self.tables.free(seq_id)
        del self.tokens[seq_id], self.limits[seq_id]

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        self.tables.check({seq_id: len(tokens) for seq_id, tokens in self.tokens.items()})
        for seq_id, tokens in self.tokens.items():
            slots = [slot for block in self.tables.tables[seq_id] for slot in self.store[block]]
            assert slots[: len(tokens)] == [tuple(tokens[: i + 1]) for i in range(len(tokens))], f"sequence {seq_id}"

    @invariant()
    def slots_add_up(self):
        progress = [Progress(s, 0, len(tokens), self.limits[s]) for s, tokens in self.tokens.items()]
        held = self.tables.held(progress)
        assert min(held) >= 0
        assert held.total == (len(self.store) - self.tables.pool.num_free) * self.size
        if not self.tokens:
            assert self.tables.pool.num_free == len(self.store)

    def _new(self, tokens, limit):
        self.next_id += 1
        self.tokens[self.next_id], self.limits[self.next_id] = list(tokens), limit
        return self.next_id

    def _step(self, rows):
        """Reserves for all, then copies for all, then writes, like a step of the engine."""
        writes = [(s, Write(s, len(self.tokens[s]), len(self.tokens[s]) + len(new)), new) for s, new in rows if new]
        free = self.tables.pool.num_free
        copies = [copy for _, write, _ in writes for copy in self.tables.reserve(write)]
        assert self.tables.pool.num_free == free, "no block is taken after admission"
        moved = [(copy.dst, list(self.store[copy.src])) for copy in copies]
        assert len(dict(moved)) == len(moved), "two copies into one block"
        for block, content in moved:
            self.store[block] = content
        for seq_id, write, new in writes:
            self.tokens[seq_id] += new
            for position in range(write.start, write.end):
                block = self.tables.tables[seq_id][position // self.size]
                self.store[block][position % self.size] = tuple(self.tokens[seq_id][: position + 1])
            self.tables.mark_computed(seq_id, self.tokens[seq_id], write.end)


TestContiguous = ContiguousMachine.TestCase
TestContiguous.settings = settings(
    derandomize=True, deadline=None, database=None, max_examples=150, stateful_step_count=40
)
