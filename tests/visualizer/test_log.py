"""The record log: every viewer reconstructs the engine's state, after any start and with any requests."""

import asyncio
import json

import pytest

from minipaged.config import SamplingParams
from minipaged.events import KEPT, EngineError, Event, Sampled, State, event_from_dict
from tests.aio import run
from tests.fake import fake_engine
from visualizer import log as module
from visualizer.log import RecordLog


def record_run(log: RecordLog, requests: int = 6) -> State:
    """Publishes a run, step by step. Returns the final state."""
    engine = fake_engine(num_blocks=12)
    pending: list[Event] = []
    engine.events.subscribe(pending.append)
    log.started(engine.started_event())
    state = State()
    state.apply(engine.started_event())
    for number in range(requests):
        params = SamplingParams(n=1 + number % 3, max_tokens=12, ignore_eos=True)
        engine.add_request(f"r{number}", [number, 2, 3, 4, 5, 6], params)
    while pending or engine.has_unfinished():
        for event in pending:
            state.apply(event)
        log.publish(list(pending))
        pending.clear()
        engine.step()
    return state


def rebuilt(answer: dict, state: State | None = None) -> State:
    """The state that a viewer reconstructs from an answer."""
    if answer["keyframe"]:
        state = State.from_dict(answer["keyframe"])
    assert state is not None
    for record in answer["records"]:
        for event in record:
            state.apply(event_from_dict(event))
    return state


def test_a_viewer_from_the_start_sees_everything_once() -> None:
    log = RecordLog()
    start = json.loads(log.news(None, None, None) or "")
    final = record_run(log)
    answer = json.loads(log.news(start["run"], 0, 0) or "")
    assert answer["run"] != start["run"], "the engine's start should start a new run"
    assert answer["first"] == 0
    assert rebuilt(answer) == final
    assert log.news(answer["run"], len(answer["records"]), answer["status_version"]) is None


def test_each_record_comes_with_the_memory_of_the_process() -> None:
    log = RecordLog()
    record_run(log)
    answer = json.loads(log.news(log.run, 5, 0) or "")
    assert len(answer["rss"]) == len(answer["records"]) == log.end - 5
    assert all(50 < mib < 100_000 for mib in answer["rss"])
    assert "rss" not in "".join(log.saved()), "a recording does not depend on the machine"


def test_news_from_a_cursor_continue_a_viewers_state() -> None:
    log = RecordLog()
    final = record_run(log)
    everything = json.loads(log.news(None, None, None) or "")
    head = {**everything, "records": everything["records"][:17]}
    rest = json.loads(log.news(log.run, 17, -1) or "")
    assert rest["keyframe"] is None and rest["first"] == 17
    assert rebuilt(rest, rebuilt(head)) == final


def test_a_late_joiner_gets_a_keyframe_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HISTORY", 5)
    log = RecordLog()
    final = record_run(log, requests=20)
    answer = json.loads(log.news("another run", 3, 0) or "")
    assert answer["first"] >= module.KEYFRAME_EVERY and answer["first"] % module.KEYFRAME_EVERY == 0
    assert 5 <= len(answer["records"]) <= 5 + module.KEYFRAME_EVERY
    assert rebuilt(answer) == final


def test_old_records_are_forgotten_and_their_readers_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 2 * module.KEYFRAME_EVERY)
    log = RecordLog()
    final = record_run(log, requests=40)
    assert len(log._records) <= 2 * module.KEYFRAME_EVERY and min(log._keyframes) == log._first > 0
    answer = json.loads(log.news(log.run, 3, 0) or "")
    assert answer["keyframe"] is not None
    assert rebuilt(answer) == final


@pytest.mark.parametrize("cursor", [-1, 10**9, 1.5, True, "3", None, [1]])
def test_a_cursor_that_makes_no_sense_makes_a_late_joiner(cursor: object) -> None:
    log = RecordLog()
    final = record_run(log)
    answer = json.loads(log.news(log.run, cursor, 0) or "")
    assert rebuilt(answer) == final


@pytest.mark.parametrize("request_", [None, [], "x", 7, {}, {"run": ["x"], "cursor": {}, "status": "?"}])
def test_pull_answers_any_request(request_: object) -> None:
    log = RecordLog()
    record_run(log)
    assert json.loads(run(log.pull(request_)))["keyframe"]


def test_finished_requests_do_not_pile_up() -> None:
    log = RecordLog()
    final = record_run(log, requests=40)
    answer = json.loads(log.news(log.run, 0, -1) or "")
    assert answer["first"] == 0 and answer["keyframe"] is None, "all records are one run"
    assert log.state == final == rebuilt(json.loads(log.news(None, None, None) or ""))
    assert len(final.finished) == KEPT == len(final.requests) < final.forgotten


def test_numbers_that_json_lacks_become_null() -> None:
    log = RecordLog()
    log.publish([EngineError("x")])
    text = module.encode_events([Sampled(0, 1, "\u2028</script>\ud800", float("nan"))])
    assert json.loads(text)[0]["logprob"] is None
    text.encode()  # a lone surrogate must not break the answer


def test_pull_waits_for_news_and_for_the_status() -> None:
    async def wait() -> dict:
        log = RecordLog()
        record_run(log)
        asked = {"run": log.run, "cursor": log.end, "status": log._status_version}
        waiting = asyncio.create_task(log.pull(asked))
        await asyncio.sleep(0.15)
        assert not waiting.done()
        log.status({"paused": True})
        return json.loads(await asyncio.wait_for(waiting, 1))

    answer = run(wait())
    assert answer["status"] == {"paused": True} and answer["records"] == []


def test_pull_gives_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_POLL", 0.1)
    log = RecordLog()
    asked = {"run": log.run, "cursor": log.end, "status": log._status_version}
    assert run(log.pull(asked)) == "{}"


def test_a_crowd_is_answered_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    loops: list[asyncio.AbstractEventLoop] = []  # only of these viewers, as a page's server in this process sleeps, too
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        crowd = asyncio.get_running_loop() in loops
        if crowd:
            slept.append(seconds)
        await real(0.001 if crowd else seconds)

    monkeypatch.setattr(module, "LONG_POLL", 0.05)
    monkeypatch.setattr(module.asyncio, "sleep", sleep)

    async def crowd(size: int) -> float:
        log = RecordLog()
        asked = {"run": log.run, "cursor": 0, "status": log._status_version}
        slept.clear()
        loops.append(asyncio.get_running_loop())
        await asyncio.gather(*(log.pull(asked) for _ in range(size)))
        return max(slept)

    assert run(crowd(4)) == module.FAST
    assert run(crowd(9)) == 9 * module.SLOW
