"""Classes of wasted KV memory (reserved, internal, external) on numbers checked by hand, and on a real run."""

import pytest

from minipaged.config import SamplingParams
from minipaged.events import Recorder, StepFinished, replay
from minipaged.events.waste import (
    AHEAD,
    MANAGERS,
    Accounts,
    Held,
    Progress,
    fitting,
    held,
    next_power_of_two,
    reservation,
    timeline,
)
from tests.fake import fake_engine


def test_powers_of_two():
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 25, 32, 33)] == [0, 1, 2, 4, 32, 32, 64]


def test_the_papers_example_of_pow2():
    assert reservation("orca-pow2", 10, 25, 2048) == 10 + 32


@pytest.mark.parametrize(
    "manager, expected",
    [
        # 10 prompt tokens; 5 of 25 output tokens are generated: final length 35.
        ("orca-max", Held(token=15, reserved=20, internal=2048 - 35, external=0)),
        ("orca-pow2", Held(token=15, reserved=20, internal=7, external=64 - 42)),
        ("orca-oracle", Held(token=15, reserved=20, internal=0, external=64 - 35)),
        ("vattention", Held(token=15, reserved=17, internal=0, external=0)),
    ],
)
def test_one_sequence(manager, expected):
    assert held(manager, Progress(0, 10, 15, 35), 2048, page_tokens=32) == expected


def test_seven_requests_of_2048_fit_into_the_papers_pool():
    progress = [Progress(i, 10, 15, 35) for i in range(40)]
    assert fitting("orca-max", progress, 15_728, 2048, 32) == 7
    assert 1 - 7 * 2048 / 15_728 == pytest.approx(0.0885, abs=5e-5)


def test_chunks_are_whole_blocks():
    moment = Progress(0, 10, 15, 33)
    assert held("orca-max", moment, 2047, 32, block_size=16) == Held(15, 18, 2047 - 33, 1)
    assert held("orca-oracle", moment, 2047, 32, block_size=24) == Held(15, 18, 0, 2 * 24 - 33)
    assert held("orca-pow2", moment, 2047, 32, block_size=3) == Held(15, 18, 42 - 33, 16 * 3 - 42)


def test_a_page_group_that_the_sequence_never_fills_is_internal():
    assert held("vattention", Progress(0, 10, 30, 33), 2048, page_tokens=64) == Held(30, 3, 31, 0)


def run(n=1, stop_early=False, **settings):
    engine = fake_engine(num_blocks=40, block_size=4, **settings)
    recorder = Recorder()
    recorder(engine.started_event())
    engine.events.subscribe(recorder)
    for i in range(4):
        params = SamplingParams(n=n, max_tokens=10 + i + 8 * stop_early, ignore_eos=not stop_early)
        engine.add_request(f"r{i}", [1] * 9 + [i], params)
    while engine.has_unfinished():
        engine.step()
    return engine, recorder.events


def test_classes_sum_to_what_is_held_and_tokens_agree_where_nothing_is_shared():
    engine, events = run(enable_prefix_caching=False)
    rows = timeline(events)
    assert len(rows) == engine.scheduler.step
    for row in rows:
        tokens = {row.held[manager].token for manager in MANAGERS}
        assert len(tokens) == 1
        assert all(min(row.held[manager]) >= 0 for manager in MANAGERS)
        assert row.held["paged"].total % 4 == 0 and row.held["paged"].external == 0
        paged = row.held["paged"]
        assert paged.reserved + paged.internal < 4 * max(1, row.running)  # less than a block per sequence


def test_the_oracle_wastes_nothing_inside_and_max_the_most():
    _, events = run()
    for row in timeline(events)[:-1]:
        assert row.held["orca-oracle"].internal == 0
        assert row.held["orca-max"].total >= row.held["orca-pow2"].total >= row.held["orca-oracle"].total


def test_only_paging_shares_the_prompt():
    _, events = run(n=2, max_num_seqs=8)
    row = timeline(events)[2]
    assert row.held["paged"].token < row.held["orca-oracle"].token


def test_a_running_sequence_is_taken_to_run_to_its_limit_until_it_ends():
    _, events = run()
    first_steps = [event for event in events if event.type != "finished"][: len(events) // 2]
    early, late = timeline(first_steps), timeline(events)
    assert early[0].held["orca-oracle"].reserved >= late[0].held["orca-oracle"].reserved


def test_rows_are_the_sums_of_what_is_held_for_each_sequence():
    """Incremental sums against the definition, on a run whose sequences end early, share blocks and are preempted."""
    engine, events = run(n=2, max_num_seqs=8, stop_early=True)
    ends = {event.seq_id for event in events if event.type == "finished"}
    *_, last = replay(events)
    finals = {seq_id: len(last.seqs[seq_id].tokens) - 1 for seq_id in ends}
    rows = iter(timeline(events, page_tokens=4))
    longest = min(engine.max_model_len, 40 * 4)
    for event, state in zip(events, replay(events), strict=True):
        if not isinstance(event, StepFinished):
            continue
        row = next(rows)
        progress = [Progress(i, s.num_prompt, s.num_computed, finals[i]) for i, s in state.seqs.items() if s.table]
        for manager in (*AHEAD, "vattention"):
            assert row.held[manager] == sum((held(manager, m, longest, 4, 4) for m in progress), Held())
            assert row.fit[manager] == fitting(manager, progress, 40 * 4, longest, 4, 4)
        assert row.running == row.fit["paged"] == len(progress)
        assert row.held["paged"].total == 4 * len({block for s in state.seqs.values() for block in s.table})
        assert min(row.held["paged"]) >= 0
    assert {event.reason for event in events if event.type == "finished"} == {"stop", "length"}


def test_accounts_kept_live_end_up_where_the_timeline_does_and_change_only_what_they_must():
    _, events = run(n=2, max_num_seqs=8, stop_early=True)
    accounts, changes = Accounts(), []
    for event in events:
        accounts.apply(event)
        if isinstance(event, StepFinished):
            accounts.close()
            changes.append(accounts.update())
    assert list(accounts.rows.values()) == timeline(events)
    assert any(len(changed) > 1 for changed in changes), "a sequence that stops early changes earlier rows"
    _, events = run()
    quiet = Accounts()
    for event in events:
        quiet.apply(event)
        if isinstance(event, StepFinished):
            quiet.close()
            assert len(quiet.update()) == 1, "a sequence that runs to its limit changes no earlier row"
