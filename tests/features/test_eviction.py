"""Eviction policies on the real prefix cache, against their definitions and proved bounds."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged import SamplingParams
from minipaged.config import EVICTIONS, EngineConfig
from minipaged.core.block_table import BlockTables, Demand
from minipaged.core.plan import Chunk, StepPlan, Write
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import EMPTY_PREFIX, PrefixCache
from minipaged.core.request import Request, Sequence, Status
from minipaged.errors import InvalidConfig
from minipaged.events import EventLog, Recorder, State
from minipaged.features.eviction.policies import FIFO, LRU, Belady, FlushWhenAll0, Mark0, MarkAndPredict, Marker, path
from minipaged.features.eviction.prediction import Given, LastTurn, closing_words, discard_bits, flipped, phase_bits
from minipaged.features.eviction.predictions import Predictions
from tests.fake import fake_engine, random_prompt, unbatched

# --- paging without a prefix tree: k blocks, each with its own page ---


def faults(requests, k, policy):
    """Whether each request was a page fault (a miss)."""
    cache = PrefixCache(EventLog(), policy)
    pool, missing = BlockPool(k, cache), []
    for page in requests:
        found = cache.lookup(EMPTY_PREFIX, (page,))
        if isinstance(policy, Belady):
            policy.admitted(str(len(missing)))
        missing.append(found is None)
        if found:
            block = found[1]
            pool.share(block)
        else:
            block = pool.allocate()
            cache.insert(EMPTY_PREFIX, (page,), block)
        if getattr(policy, "predict", None):
            policy.note([block], policy.predict((page,)))
        pool.free(block)
        pool.check()
    return missing


def belady(requests):
    return Belady([(page, -1) for page in requests], block_size=1)


def fewest(requests, k):
    """The minimum number of faults of any algorithm, by trying all evictions."""
    caches = {frozenset(): 0}
    for page in requests:
        new = {}
        for cache, count in caches.items():
            if page in cache:
                options = [(cache, count)]
            elif len(cache) < k:
                options = [(cache | {page}, count + 1)]
            else:
                options = [(cache - {victim} | {page}, count + 1) for victim in cache]
            for option, cost in options:
                new[option] = min(cost, new.get(option, cost))
        caches = new
    return min(caches.values())


pages = st.lists(st.integers(0, 5), min_size=1, max_size=30)
sizes = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(pages, sizes)
def test_belady_has_the_fewest_faults_there_can_be(requests, k):
    assert sum(faults(requests, k, belady(requests))) == fewest(requests, k)


@settings(max_examples=60, deadline=None)
@given(pages, sizes, st.integers(0, 9))
def test_with_perfect_bits_the_discard_policies_are_belady_fault_for_fault(requests, k, seed):
    best, bits = faults(requests, k, belady(requests)), discard_bits(requests, k)
    assert faults(requests, k, FlushWhenAll0(Given(bits))) == best
    assert faults(requests, k, Mark0(Given(bits), seed)) == best


def test_long_sequences_too():
    rng = Random(3)
    requests = [min(int(rng.paretovariate(0.6)), 400) for _ in range(2000)]
    best, bits = faults(requests, 20, belady(requests)), discard_bits(requests, 20)
    assert 200 < sum(best) < 1900
    for policy in (FlushWhenAll0(Given(bits)), Mark0(Given(bits))):
        assert faults(requests, 20, policy) == best
    for policy in (LRU(), FIFO(), Marker(), MarkAndPredict(Given(phase_bits(requests, 20)))):
        assert sum(faults(requests, 20, policy)) > sum(best)


class EveryChoice:
    """A stand-in for a random generator that enumerates all choices."""

    def __init__(self, path):
        self.path, self.asked, self.probability = path, 0, 1.0

    def choice(self, options):
        if self.asked == len(self.path):
            self.path.append([0, len(options)])
        index, count = self.path[self.asked]
        assert count == len(options)
        self.asked += 1
        self.probability /= count
        return options[index]


def expected_faults(requests, k, make):
    """The exact expected number of faults, over all random choices, so the bounds need no tolerance."""
    path, total = [], 0.0
    while True:
        policy = make()
        policy._random = EveryChoice(path)
        count = sum(faults(requests, k, policy))
        total += count * policy._random.probability
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return total
        path[-1][0] += 1


def harmonic(k):
    return sum(1 / n for n in range(1, k + 1))


def errors(bits, right):
    """η₀ and η₁: the numbers of wrong 0s and of wrong 1s."""
    return (sum(bit == kind != truth for bit, truth in zip(bits, right, strict=True)) for kind in (False, True))


short = st.lists(st.integers(0, 4), min_size=1, max_size=10)
wrong = st.lists(st.booleans(), min_size=10, max_size=10)


def spoiled(right, wrong):
    return [bit != flip for bit, flip in zip(right, wrong, strict=False)]


@settings(max_examples=100, deadline=None)
@given(pages, sizes, st.lists(st.booleans(), min_size=30, max_size=30))
def test_the_bound_of_flush_when_all_0(requests, k, wrong):
    right = discard_bits(requests, k)
    bits = spoiled(right, wrong)
    zeros, ones = errors(bits, right)
    assert sum(faults(requests, k, FlushWhenAll0(Given(bits)))) <= fewest(requests, k) + (k - 1) * zeros + ones


@settings(max_examples=40, deadline=None)
@given(short, st.integers(2, 3), wrong)
def test_the_bound_of_mark_0(requests, k, wrong):
    right = discard_bits(requests, k)
    bits = spoiled(right, wrong)
    zeros, ones = errors(bits, right)
    mean = expected_faults(requests, k, lambda: Mark0(Given(bits)))
    assert mean <= fewest(requests, k) + 2 * harmonic(k) * zeros + ones + 1e-9


@settings(max_examples=40, deadline=None)
@given(short, st.integers(2, 3), wrong)
def test_the_bound_of_mark_and_predict(requests, k, wrong):
    right = phase_bits(requests, k)
    bits = spoiled(right, wrong)
    zeros, ones = errors(bits, right)
    mean = expected_faults(requests, k, lambda: MarkAndPredict(Given(bits)))
    assert mean <= 2 * fewest(requests, k) + harmonic(k) * zeros + ones + 1e-9


def test_the_oldest_goes_first_and_only_lru_cares_for_a_hit():
    requests = [1, 2, 3, 1, 4, 1]
    assert faults(requests, 3, LRU()) == [1, 1, 1, 0, 1, 0]
    assert faults(requests, 3, FIFO()) == [1, 1, 1, 0, 1, 1]


def test_all_zeros_empty_the_cache():
    policy = FlushWhenAll0(lambda tokens: False)
    # 4 finds the cache full, so 1 to 3 may be evicted. 2 is hit before its block is reused, and counts as new.
    assert faults([1, 2, 3, 4, 2, 5, 4, 2, 5], 3, policy) == [1, 1, 1, 1, 0, 1, 0, 0, 0]
    assert "all bits were 0" in policy.reason


def test_marks_last_for_a_phase():
    for seed in range(10):
        # 1 and 2 are used in the second phase, so only 3 can be evicted for 5.
        assert faults([1, 2, 3, 4], 3, Marker(seed)) == [1] * 4
        policy = MarkAndPredict(Given([0, 1, 0, 0, 0, 0]), seed)
        assert faults([1, 2, 3, 4, 1, 3], 3, policy) == [1, 1, 1, 1, 0, 0]  # the bit 1 decides which one is evicted


def test_a_seed_repeats_and_another_differs():
    rng = Random(1)
    requests = [rng.randrange(12) for _ in range(200)]
    runs = [faults(requests, 6, Marker(seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


# --- bits ---


def test_phase_bits_look_one_phase_ahead():
    #        phase 1    2       3
    assert phase_bits([1, 2, 1, 3, 1, 2], 2) == [False, True, False, True, True, True]
    assert discard_bits([1, 2, 3, 1, 2], 2) == [False, True, True, False, False]


def test_errors_of_the_two_kinds_are_made_apart():
    bits = [False, True] * 500
    assert flipped(bits, 0, 0) == bits and flipped(bits, 1, 1) == [True, False] * 500
    only = flipped(bits, 0.3, 0)
    assert all(bit for bit in only[1::2]) and 100 < sum(only[::2]) < 200
    assert flipped(bits, 0, 0.3, seed=1) != flipped(bits, 0, 0.3, seed=2)


# --- trees, on real block tables ---


class Books:
    """Block tables and the stage that predicts, without an engine."""

    def __init__(self, num_blocks, block_size, policy, events=None):
        self.tables, self.stage = BlockTables(num_blocks, block_size, events, policy=policy), Predictions()
        self.stage.bind(SimpleNamespace(memory=self.tables, events=self.tables.events))
        self.requests = {}

    def use(self, seq_id, tokens):
        """Computes a sequence's prompt. Returns the number of blocks that hit the prefix cache."""
        tables, hits = self.tables, self.tables.match(tokens)
        start = len(hits) * tables.block_size
        tables.open(seq_id, hits, Demand([len(tokens)], len(tokens), len(tokens), 1))
        tables.reserve(Write(seq_id, start, len(tokens)))
        request = self.requests[seq_id] = Request.__new__(Request)
        request.status = Status.RUNNING
        seq = Sequence(seq_id, tokens, len(tokens), Random())
        self.stage.planned(StepPlan(0, [Chunk(request, seq, start, len(tokens) - start, [seq], [])]))
        tables.mark_computed(seq_id, tokens, len(tokens))
        return len(hits)

    def free(self, seq_id):
        """Ends the sequence and frees its blocks."""
        self.stage.releasing(self.requests[seq_id], Sequence(seq_id, [], 0, Random()))
        self.tables.free(seq_id)
        self.requests.pop(seq_id).status = Status.FINISHED
        self.stage.committed(StepPlan(0))


def policies(requests):
    """One policy of each class, with random predictions."""
    rng = Random(0)
    bits = [rng.random() < 0.5 for _ in range(10_000)]
    made = [LRU(), FIFO(), Marker(), Belady(requests, 2), FlushWhenAll0(Given(bits))]
    return [*made, Mark0(Given(bits)), MarkAndPredict(Given(bits))]


@pytest.mark.parametrize("index", range(7))
def test_no_block_goes_before_those_that_continue_it(index):
    rng = Random(index)
    requests = [[1, 1] + [rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(60)]
    events = EventLog()
    policy = policies(requests)[index]
    books = Books(14, 2, policy, events)
    tables = books.tables
    parents, evictions = {}, []  # cached prefix → its parent
    names = {}

    def watch(event):
        if event.type == "cached":
            names[event.block], parents[event.prefix] = event.prefix, event.parent
        elif event.type == "evicted":
            gone = names.pop(event.block)
            del parents[gone]
            evictions.append(event.reason)
            below = [b for b, name in names.items() if parents[name] == gone and tables.pool.ref_counts[b] == 0]
            assert not below, f"{type(policy).__name__} evicted the parent of cached blocks {below}"

    events.subscribe(watch)
    for number, prompt in enumerate(requests):
        if isinstance(policy, Belady):
            policy.admitted(str(number))
        books.use(number, prompt)
        if number:
            books.free(number - 1)  # two run at a time, so some compute the same tokens in separate blocks
            tables.check()
    assert len(evictions) > 20 and all(evictions)


def test_a_beginning_outlives_a_copy_of_it_that_others_go_on_from():
    """Sequence 0 ends first. In the prefix tree, sequence 1's tail follows 0's block, of which 1 has its own copy."""
    tables = BlockTables(4, 2)
    tables.open(0), tables.open(1)
    for seq_id, tokens in ((0, [1, 1]), (1, [1, 1, 2, 2])):
        tables.reserve(Write(seq_id, 0, len(tokens)))
    for seq_id, tokens in ((0, [1, 1]), (1, [1, 1, 2, 2])):
        tables.mark_computed(seq_id, tokens, len(tokens))
    tables.free(0), tables.free(1)
    tables.open(2)
    tables.reserve(Write(2, 0, 6))  # two blocks are free; the third has to be evicted
    assert len(tables.match([1, 1, 2, 2, 3])) == 1  # its tail is evicted, not its older head


def test_a_block_has_the_bit_of_its_latest_request():
    policy = FlushWhenAll0(Given([False, True, False]))
    books = Books(8, 2, policy)
    books.use(0, [1, 1, 2, 2, 9])
    books.use(1, [1, 1, 3, 3, 9])
    assert policy.bits == {}  # blocks in use cannot be evicted, so they need no bits
    books.free(0)
    assert policy.bits == {0: False, 1: False}
    books.free(1)
    assert policy.bits[0] is True and policy.bits[1] is False
    books.use(2, [1, 1, 3, 3, 8])
    books.free(2)
    assert not any(policy.bits.values())


def test_a_block_that_is_evicted_loses_its_bit():
    policy = Mark0(Given([True]))
    books = Books(2, 2, policy)
    books.use(0, [1, 1, 0])
    books.free(0)
    assert policy.bits == {0: True}
    books.tables.open(1)
    books.tables.reserve(Write(1, 0, 4))
    assert policy.bits == {}


def test_the_path_of_a_block_whose_beginning_is_gone_is_unknown():
    cache = PrefixCache(EventLog())
    name = cache.insert(EMPTY_PREFIX, (1,), 0)
    cache.insert(name, (2,), 1)
    assert path(cache, 1) == [(1,), (2,)]
    cache.retire(0)
    cache.evict()
    assert path(cache, 1) == []


def test_belady_on_a_tree_keeps_what_comes_next():
    requests = [[1, 1, 1, 1, 0], [2, 2, 2, 2, 0], [3, 3, 0], [1, 1, 1, 1, 0]]
    for policy, found in ((Belady(requests, 2), 2), (LRU(), 1)):
        books = Books(5, 2, policy)
        for number, prompt in enumerate(requests):
            if isinstance(policy, Belady):
                policy.admitted(str(number))
                policy.admitted(str(number))  # a second admission after preemption does not advance
            hits = books.use(number, prompt)
            books.free(number)
        assert hits == found


# --- the engine ---


@pytest.mark.parametrize("memory", ["paged", "vattention"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_the_engine_says_the_same_with_every_policy(eviction, memory):
    random = Random(f"{eviction}/{memory}")
    swap = {"preemption": "swap", "swap_blocks": 12} if random.random() < 0.5 else {}
    engine, record = fake_engine(num_blocks=24, eviction=eviction, memory=memory, **swap), Recorder()
    state = State()
    engine.events.subscribe(record)
    engine.events.subscribe(state.apply)
    record(engine.started_event()), state.apply(engine.started_event())
    prompts = {str(number): random_prompt(random, 30) for number in range(24)}
    params = SamplingParams(max_tokens=12, n=2)
    coming, outputs = list(prompts), {}
    while coming or engine.has_unfinished():
        if coming:
            engine.add_request(coming[0], prompts[coming.pop(0)], params)
        for output in engine.step():
            outputs[output.request_id] = output
        engine.check()
        assert set(state.predicted) <= set(state.cached)
        assert state.predicted == getattr(engine.memory.prefix_cache.policy, "bits", {})
    for request_id, prompt in prompts.items():
        for branch in range(2):
            expected = unbatched(prompt, params, branch, 200)
            assert list(outputs[request_id].outputs[branch].token_ids) == expected
    assert any(event.type == "evicted" and event.reason for event in record.events)
    predicting = eviction not in ("lru", "fifo", "marker")
    assert any(event.type == "predicted" for event in record.events) == predicting


@pytest.mark.parametrize(
    "settings",
    [
        {"eviction": "belady"},
        {"eviction": LRU},
        {"eviction": ["lru"]},
        {"eviction": "fifo", "enable_prefix_caching": False},
        {"eviction": "fifo", "eviction_policy": LRU},
        {"eviction": "lru", "memory": "orca-max"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(settings):
    with pytest.raises(InvalidConfig, match="eviction"):
        EngineConfig(**settings)


# --- is this the last turn? ---


def conversation(number, turns):
    """Prompts of one conversation: each prompt is a prefix of the next."""
    return [[number] + [7] * turn for turn in range(1, turns + 1)]


def test_it_learns_after_how_many_turns_conversations_end():
    predict = LastTurn(patience=4)
    for number in range(12):
        bits = [predict(prompt) for prompt in conversation(number, 3)]
    assert bits == [False, False, True]
    assert [predict(prompt) for prompt in conversation(99, 2)] == [False, False]


def test_who_says_goodbye_goes_until_it_is_seen_to_come_back():
    predict = LastTurn(closing=lambda tokens: tokens[-1] == 7, patience=100)
    assert predict([1, 2]) is False and predict([1, 2, 7]) is True
    for number in range(2, 5):
        for prompt in conversation(number, 9):
            predict(prompt)
    assert predict.expects_end(2, True) is False


def test_a_prompt_that_comes_again_is_no_other_turn():
    predict = LastTurn(patience=2)
    for _ in range(50):
        assert predict([1, 2, 3]) is False
    assert predict._now == 1


def test_what_nobody_continues_is_forgotten():
    predict = LastTurn(patience=10)
    for number in range(100):
        predict([number])
    assert len(predict._open) == 10


@pytest.mark.parametrize("patience", [0, True, 1.5])
def test_patience_is_a_number_of_requests(patience):
    with pytest.raises(InvalidConfig, match="patience"):
        LastTurn(patience=patience)


def test_words_of_goodbye_are_looked_for_at_the_end():
    class Words:
        def decode(self, tokens):
            return " ".join(tokens)

    closes = closing_words(Words())
    assert closes("That is fine, Thanks !".split()) and closes(["goodbye"])
    assert not closes(["thanksgiving"]) and not closes(["thanks", *["so"] * 30])
