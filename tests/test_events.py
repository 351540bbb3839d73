"""Events, recordings and the reducer. The fuzz test compares replay with the engine's block tables in every step."""

import json
from random import Random

import pytest

from minipaged.config import SamplingParams
from minipaged.events import (
    EVENT_TYPES,
    Allocated,
    Recorder,
    SeqState,
    Speculated,
    State,
    event_from_dict,
    load_recording,
    replay,
)
from minipaged.features.batchllm.groups import BatchItem
from tests.fake import fake_engine, guess_at_random


def busy_engine():
    """An engine that forks, copies, shares, predicts, evicts, swaps, preempts and drafts within a few dozen steps."""
    sizes = {"num_blocks": 14, "block_size": 4, "max_num_seqs": 6, "swap_blocks": 8}
    engine = fake_engine(preemption="swap", eviction="mark-0", speculate="prompt-lookup", **sizes)
    guess_at_random(engine, Random(1), right=0.7)
    return engine


def add_requests(engine):
    for i in range(5):
        engine.add_request(f"r{i}", [1] * 9 + [i], SamplingParams(n=1 + i % 3, max_tokens=12, ignore_eos=True))
    engine.add_batch([BatchItem(f"b{i}", [2] * 6 + [i], SamplingParams(max_tokens=3)) for i in range(2)])


def record(path=None):
    engine, recorder = busy_engine(), Recorder(path)
    recorder(engine.started_event())
    engine.events.subscribe(recorder)
    add_requests(engine)
    while engine.has_unfinished():
        engine.step()
    recorder.close()
    return recorder.events


def test_a_recording_reads_back_as_it_was(tmp_path):
    events = record(tmp_path / "run.jsonl")
    assert load_recording(tmp_path / "run.jsonl") == events
    kinds = {event.type for event in events}
    assert kinds >= set(EVENT_TYPES) - {"engine_error"}, "the run above should emit every type of event"


def test_every_event_survives_json():
    for event in record():
        assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event


def test_replay_from_a_keyframe_equals_replay_from_the_start():
    events = record()
    middle = len(events) // 2
    states = list(replay(events[:middle]))
    resumed = State.from_dict(json.loads(json.dumps(states[-1].to_dict())))
    whole = State()
    for event in events:
        whole.apply(event)
    for event in events[middle:]:
        resumed.apply(event)
    assert resumed == whole


def test_the_last_state_is_an_idle_engine():
    events = record()
    *_, state = replay(events)
    assert not state.waiting and not state.running and len(state.finished) == 7
    assert set(state.ref_counts) == {0}


def test_a_state_has_the_engines_tables_after_every_step():
    engine, state = busy_engine(), State()
    state.apply(engine.started_event())
    engine.events.subscribe(state.apply)
    taken_back = []
    engine.events.subscribe(lambda event: taken_back.extend(event.blocks) if event.type == "speculated" else None)
    add_requests(engine)
    while engine.has_unfinished():
        engine.step()
        expected = {seq_id: table for seq_id, table in engine.block_tables().items() if table}
        assert {seq_id: seq.table for seq_id, seq in state.seqs.items() if seq.table} == expected
    assert taken_back, "the run above should free blocks of rejected drafts"


def test_a_run_that_starts_anew_forgets_the_one_before():
    started, *rest = record()
    state, fresh = State(), State()
    for event in (started, *rest[: len(rest) // 2], started):
        state.apply(event)
    fresh.apply(started)
    assert state == fresh


@pytest.mark.parametrize("event", [Allocated(0, 3, 1), Speculated(0, 1, 0, [4])])
def test_a_table_that_changes_elsewhere_than_at_its_end_is_refused(event):
    state = State(seqs={0: SeqState("r", 1, [1], ["a"], [None], table=[5])}, ref_counts=[0] * 6)
    with pytest.raises(ValueError, match="at their end"):
        state.apply(event)


def test_asserts_in_tests_are_checked_under_python_o_too():
    """pytest rewrites a test module's asserts into raises. Otherwise `make test-optimized` would always pass."""
    try:
        assert not EVENT_TYPES
    except AssertionError:
        return
    pytest.fail("asserts are not executed")


def test_an_engine_nobody_listens_to_makes_no_events(monkeypatch):
    engine = busy_engine()
    add_requests(engine)
    for cls in EVENT_TYPES.values():
        monkeypatch.setattr(cls, "__init__", lambda *_: pytest.fail("an event was created without subscribers"))
    while engine.has_unfinished():
        engine.step()


def test_unsubscribing_ends_it():
    engine, seen = busy_engine(), []
    add_requests(engine)
    stop = engine.events.subscribe(seen.append)
    engine.step()
    stop()
    count = len(seen)
    engine.step()
    assert count and len(seen) == count


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("hello\n", "line 1"),
        ("[1]\n", "line 1"),
        ('{"format": "something else"}\n', "line 1"),
        ('{"format": "minipaged-recording/1"}\n{"type": "step_started"}\n', "line 2"),
        ('{"format": "minipaged-recording/1"}\n{"type": "unheard_of"}\n', "line 2"),
        ('{"format": "minipaged-recording/1"}\n{"type": "step_started", "step"', "line 2"),
    ],
)
def test_a_foreign_or_broken_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recording(path)
