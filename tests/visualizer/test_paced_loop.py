"""The paced engine loop and its commands, without a browser and without a model."""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from minipaged import SamplingParams
from minipaged.core.plan import SampledToken
from minipaged.errors import InvalidRequest, RequestFailed
from tests.aio import run
from tests.fake import fake_engine
from visualizer.commands import Commands
from visualizer.log import RecordLog
from visualizer.paced_loop import MAX_WAITING, PacedLoop
from visualizer.scenarios import Arrival, Scenario

SCENARIO = Scenario("two", (Arrival(0, "one", max_tokens=20), Arrival(5, "two", n=2, max_tokens=20)))
GOOD = {"do": "submit", "prompt": "hello", "n": 1, "temperature": 0.5, "max_tokens": 5}


@pytest.fixture
def thread() -> Iterator[PacedLoop]:
    llm: Any = SimpleNamespace(engine=fake_engine(), encode=lambda text: [len(text) % 50] * len(text.split()))
    llm.render_chat = lambda messages: llm.encode(messages[0]["content"])
    llm.default_params, llm.generation_config = SamplingParams(), None
    thread = PacedLoop(llm, RecordLog(), rate=None)
    thread.start()
    yield thread
    thread.stop()
    assert not thread._thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def ask(thread: PacedLoop, payload: Any) -> dict[str, Any]:
    return run(Commands(thread, SCENARIO)(payload))


def idle(thread: PacedLoop) -> bool:
    return not thread.call(lambda: thread._has_work()).result(5)


def test_a_request_runs_to_its_end_and_is_logged(thread: PacedLoop) -> None:
    request_id = thread.submit(Arrival(0, "a b c", n=3, max_tokens=9)).result(5)
    until(lambda: request_id in thread._sink.state.finished)
    assert len(thread._sink.state.requests[request_id]) == 3
    thread.call(thread.engine.check).result(5)


def test_a_request_that_fails_alone_is_told_and_the_other_goes_on(thread: PacedLoop) -> None:
    sample, told = thread.engine.sampler, []

    def sampler(contexts: Any, plan: Any) -> Any:
        tokens = zip(sample(contexts, plan), plan.samples, strict=True)
        failed = SampledToken(-1, error=RequestFailed("no token can be drawn"))
        return [failed if request.params.seed == 13 else token for token, (request, _) in tokens]

    thread.engine.sampler = sampler
    thread.engine.events.subscribe(lambda event: told.append(event) if event.type == "engine_error" else None)
    good, bad = (thread.submit(Arrival(0, "a b c", max_tokens=9, seed=seed)).result(5) for seed in (1, 13))
    until(lambda: {good, bad} <= set(thread._sink.state.finished))
    state = thread._sink.state
    assert [state.seqs[state.requests[one][0]].finish_reason for one in (good, bad)] == ["length", "error"]
    assert [event.message for event in told] == [f"{bad} failed: no token can be drawn"]


def test_paused_it_computes_nothing_and_steps_one_at_a_time(thread: PacedLoop) -> None:
    thread.pause().result(5)
    thread.submit(Arrival(0, "a b c", max_tokens=9)).result(5)
    time.sleep(0.05)
    assert not thread._sink.state.running
    for expected in range(3):
        thread.step().result(5)
        assert thread._sink.state.step == expected
    thread.resume().result(5)
    until(lambda: idle(thread))


def test_the_rate_is_kept(thread: PacedLoop) -> None:
    thread.set_rate(50).result(5)
    started = time.monotonic()
    thread.submit(Arrival(0, "a b c", max_tokens=20, seed=1)).result(5)
    until(lambda: idle(thread))
    steps = thread._sink.state.step + 1
    assert (time.monotonic() - started) > (steps - 8) / 50


def test_reset_starts_over_with_an_empty_pool(thread: PacedLoop) -> None:
    thread.submit(Arrival(0, "a b c d e f g h", max_tokens=100)).result(5)
    before = thread._sink.run
    thread.reset().result(5)
    assert thread._sink.run != before
    assert not thread._sink.state.seqs and not any(thread._sink.state.ref_counts)
    assert thread.engine.block_tables() == {} and idle(thread)


def test_a_scenario_arrives_at_its_steps_and_repeats(thread: PacedLoop) -> None:
    finals = []
    for _ in range(2):
        thread.reset(SCENARIO).result(5)
        until(lambda: idle(thread))
        finals.append(thread._sink.state.to_dict())
    assert finals[0] == finals[1]
    assert len(finals[0]["seqs"]) == 3


def test_a_failed_step_is_told_and_the_engine_goes_on(thread: PacedLoop) -> None:
    thread.pause().result(5)
    thread.submit(Arrival(0, "a b", max_tokens=5)).result(5)
    real = thread.engine.runner.execute

    def fail(plan: Any) -> Any:
        thread.engine.runner.execute = real
        raise RuntimeError("out of luck")

    thread.engine.runner.execute = fail
    thread.step().result(5)
    assert "out of luck" in thread._sink.state.error
    thread.resume().result(5)
    after = thread.submit(Arrival(0, "a b c", max_tokens=5)).result(5)
    until(lambda: after in thread._sink.state.finished)


def test_a_bug_in_a_step_is_told_and_pauses(thread: PacedLoop) -> None:
    def bug() -> None:
        raise KeyError("who knows")

    thread.pause().result(5)
    thread.engine.step = bug
    thread.submit(Arrival(0, "a b", max_tokens=5)).result(5)
    thread.resume().result(5)
    until(lambda: thread._paused)
    assert "who knows" in thread._sink.state.error
    assert thread._thread.is_alive()


def test_a_sink_that_raises_does_not_end_the_thread(thread: PacedLoop) -> None:
    thread._sink.publish = lambda events: 1 / 0
    thread.submit(Arrival(0, "a b", max_tokens=5)).result(5)
    until(lambda: idle(thread))


def test_the_waiting_queue_has_an_end(thread: PacedLoop) -> None:
    thread.pause().result(5)
    for _ in range(MAX_WAITING):
        thread.submit(Arrival(0, "a", max_tokens=1)).result(5)
    with pytest.raises(InvalidRequest, match="waiting"):
        thread.submit(Arrival(0, "a", max_tokens=1)).result(5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "  \n"}, "empty"),
        ({"prompt": 7}, "text"),
        ({"prompt": "x" * 30_000}, "characters"),
        ({"prompt": "word " * 500}, "tokens"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"n": 0}, "Samples"),
        ({"n": 5}, "Samples"),
        ({"n": 1.5}, "Samples"),
        ({"n": True}, "Samples"),
        ({"n": "2"}, "Samples"),
        ({"temperature": float("nan")}, "Temperature"),
        ({"temperature": float("inf")}, "Temperature"),
        ({"temperature": -1}, "Temperature"),
        ({"temperature": None}, "Temperature"),
        ({"max_tokens": 0}, "Max tokens"),
        ({"max_tokens": 10**9}, "Max tokens"),
        ({"max_tokens": None}, "Max tokens"),
        ({"do": "rm"}, "no command"),
        ({"do": None}, "no command"),
        ({"do": "rate", "rate": 0}, "Speed"),
        ({"do": "rate", "rate": float("nan")}, "Speed"),
        ({"do": "rate", "rate": [1]}, "Speed"),
        ({"do": "abort", "request_id": {}}, "text"),
        ({"do": "fork"}, "text"),
        ({"do": "fork", "request_id": ["request-0"]}, "text"),
        ({"do": "fork", "request_id": "x" * 500}, "characters"),
        ({"do": "fork", "request_id": "nobody"}, "only such can be forked"),
        ({"do": "attention"}, "sequence must be"),
        ({"do": "attention", "seq_id": 0}, "position must be"),
        ({"do": "attention", "seq_id": "0", "position": 0}, "sequence must be"),
        ({"do": "attention", "seq_id": -1, "position": 0}, "sequence must be"),
        ({"do": "attention", "seq_id": 0, "position": 1.5}, "position must be"),
        ({"do": "attention", "seq_id": 0, "position": True}, "position must be"),
        ({"do": "attention", "seq_id": 0, "position": float("nan")}, "position must be"),
        ({"do": "attention", "seq_id": 7, "position": 0}, "ended"),
    ],
)
def test_bad_commands_get_words_and_change_nothing(thread: PacedLoop, change: dict, words: str) -> None:
    answer = ask(thread, GOOD | change)
    assert answer["ok"] is False and words in answer["message"]
    assert not thread._sink.state.requests and idle(thread)
    assert ask(thread, GOOD)["ok"]


@pytest.mark.parametrize("payload", [None, [], "submit", 3, [GOOD]])
def test_what_is_no_object_is_refused(thread: PacedLoop, payload: Any) -> None:
    assert ask(thread, payload)["ok"] is False


def test_every_command_works(thread: PacedLoop) -> None:
    for do in ("pause", "step", "resume", "reset", "play"):
        assert ask(thread, {"do": do})["ok"], do
    assert ask(thread, {"do": "rate", "rate": "max"})["ok"]
    submitted = ask(thread, GOOD | {"chat": True})
    assert submitted["ok"]
    assert ask(thread, {"do": "abort", "request_id": submitted["result"]})["ok"]
    assert ask(thread, {"do": "abort", "request_id": "nobody"})["ok"], "aborting twice is allowed"
