"""Every scenario shows what it promises on the real engine, and every question's answer is the engine's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from minipaged import LLM
from minipaged.config import EngineConfig
from minipaged.core.prefix_cache import LRU
from minipaged.events import EngineStarted, Event, State
from visualizer.paced_loop import DEFAULT_RATE, PacedLoop
from visualizer.scenarios import SCENARIOS, Scenario, menu

STEPS = int(20 * DEFAULT_RATE)  # steps in 20 seconds
# Steps after which each scenario has shown its point.
ENOUGH = {"opening": 235, "samples": 20, "beams": 40, "prefix": 130, "recompute": 120, "swap": 120, "chunked": 32,
          "burst": 90, "fragmentation": 80, "without-holes": 40, "predictions": 112,
          "speculation": 50, "batchllm": 150}  # fmt: skip


@dataclass
class Run:
    """The events and the state that a viewer would have seen, and the scenario's question."""

    events: list[Event]
    state: State
    question: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None

    @property
    def prompts(self) -> dict[str, list[int]]:
        return {event.request_id: event.prompt_token_ids for event in self.of("request_added")}

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.type == kind]


class Viewer:
    """A sink that keeps all events."""

    def started(self, event: Event) -> None:
        self.events: list[Event] = []
        self.state = State()
        self.state.apply(event)

    def publish(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            self.state.apply(event)

    def status(self, status: dict[str, Any]) -> None:
        self.now = status


def play(llm: LLM, scenario: Scenario) -> Run:
    """Runs the scenario's first steps at full speed in this thread, and answers its question."""
    viewer, home = Viewer(), llm.engine
    thread = PacedLoop(llm, viewer, rate=None)
    settle(thread, thread.reset(scenario))
    run = Run(viewer.events, viewer.state)
    assert thread._asks == scenario.asks
    settle(thread, thread.set_asking(True))
    assert ENOUGH[scenario.key] < STEPS
    while thread.engine.scheduler.step < ENOUGH[scenario.key] and thread._has_work():
        thread._advance()
        thread.engine.check()
        if thread._question is not None:
            thread._publish_status()
            seen, run.question = len(viewer.events), viewer.now["question"]
            settle(thread, thread.answer(viewer.now["question"]["id"]))
            assert len(viewer.events) > seen, "the step is shown after the answer"
            run.verdict = viewer.now["verdict"]
    run.events, run.state = viewer.events, viewer.state
    llm.engine = home  # so that each scenario starts from the same settings
    return run


def settle(thread: PacedLoop, future: Any) -> None:
    thread._obey(*thread._commands.get())
    future.result(0)


@pytest.fixture(scope="module")
def model() -> LLM:
    """An engine with settings that no scenario has."""
    return LLM("tiny", num_blocks=16, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture(scope="module")
def runs(model: LLM) -> dict[str, Run]:
    return {}


@pytest.fixture
def run(request: pytest.FixtureRequest, model: LLM, runs: dict[str, Run]) -> Run:
    key = request.param
    if key not in runs:
        runs[key] = play(model, SCENARIOS[key])
    return runs[key]


def of(key: str) -> Any:
    return pytest.mark.parametrize("run", [key], indirect=True)


def step_of(run: Run, event: Event) -> int:
    steps = [e.step for e in run.events[: run.events.index(event)] if e.type == "step_started"]
    return steps[-1]


def running_at_once(run: Run) -> list[set[int]]:
    steps: list[set[int]] = []
    for event in run.events:
        if event.type == "step_started":
            steps.append(set())
        elif event.type == "scheduled":
            steps[-1].add(event.seq_id)
    return steps


def right(run: Run) -> str:
    assert run.question and run.verdict
    return run.question["choices"][run.verdict["answer"]]


@of("opening")
def test_opening_fills_the_pool_and_brings_the_preempted_back(run: Run) -> None:
    assert run.of("forked") and run.of("copied")
    admitted = Counter(event.request_id for event in run.of("admitted"))
    assert len(admitted) == 8 and max(admitted.values()) > 1
    first = run.of("preempted")[0]
    assert admitted[first.request_id] > 1 and step_of(run, first) < 11 * DEFAULT_RATE


@of("samples")
def test_samples_fork_and_copy(run: Run) -> None:
    assert len(run.of("forked")) == 3
    copies = run.of("copied")
    assert len(copies) == 3 and len({copy.src for copy in copies}) == 1
    assert right(run) == "3"


@of("beams")
def test_beams_fork_copy_and_are_pruned(run: Run) -> None:
    pruned = [event.seq_id for event in run.of("finished") if event.reason == "pruned"]
    assert len(pruned) > 5 and len(run.of("forked")) > 5 and run.of("copied")
    first = next(event.seq_id for event in run.of("finished") if right(run)[0] == chr(65 + event.seq_id % 26))
    assert first in pruned


@of("prefix")
def test_a_shared_system_prompt_is_found_in_the_cache(run: Run) -> None:
    first, *others = run.of("admitted")
    assert first.num_cached == 0 and len(others) == 3 and all(event.num_cached >= 32 for event in others)
    assert right(run) == str(others[0].num_cached)
    shared = [event for event in run.of("shared") if event.reason == "prefix"]
    sizes = Counter(event.seq_id for event in shared)
    assert all(sizes[event.seq_id] * 16 == event.num_cached for event in others)
    ends = {event.seq_id: step_of(run, event) for event in run.of("finished")}
    assert all(ends[seq_id] < step_of(run, others[2]) for seq_id in (0, 1, 2)), "D arrives after the others have ended"


@of("predictions")
def test_who_said_goodbye_is_evicted_first_and_who_comes_back_finds_all(run: Run) -> None:
    kept, given_up = run.of("predicted")[:2]
    assert not kept.discard and given_up.discard
    evicted = [event for event in run.of("evicted") if "bit is 1" in event.reason]
    assert [event.block for event in evicted] == given_up.blocks, "the last block is evicted first"
    assert right(run) == f"block {given_up.blocks[0]}, bit 1"
    back = run.of("admitted")[3]
    assert back.num_cached >= 32 and back.num_cached // 16 >= len(kept.blocks) - 1


@of("recompute")
def test_without_room_the_last_to_come_is_computed_again(run: Run) -> None:
    (first, *_) = run.of("preempted")
    assert first.mode == "recompute" and first.request_id == "request-3" and right(run) == "D"
    back = run.of("admitted")[-1]
    assert back.request_id == first.request_id and back.num_cached == 0
    again = [event for event in run.of("scheduled") if event.seq_id == 3 and event.start == 0]
    assert len(again) == 2 and again[1].num_tokens > 4 * again[0].num_tokens


@of("swap")
def test_with_swapping_nothing_is_computed_twice(run: Run) -> None:
    (first, *_) = run.of("preempted")
    assert first.mode == "swap" and first.request_id in [event.request_id for event in run.of("resumed")]
    out, back = run.of("swapped_out")[0], run.of("swapped_in")[-1]
    assert out.seq_id == back.seq_id == 3 and out.swap_blocks == back.swap_blocks
    assert right(run) == str(len(out.blocks))
    assert len([event for event in run.of("scheduled") if event.seq_id == 3 and event.start == 0]) == 1


@of("chunked")
def test_a_long_prompt_is_read_in_chunks_while_others_write(run: Run) -> None:
    chunks = [event for event in run.of("scheduled") if event.seq_id == 3 and event.num_tokens > 1]
    assert len(chunks) > 5 and all(event.num_tokens == 17 for event in chunks[:-1])
    assert right(run) == "17"
    steps = {step_of(run, event) for event in chunks}
    writers = [event.seq_id for event in run.of("scheduled") if step_of(run, event) in steps]
    assert all(writers.count(seq_id) == len(chunks) for seq_id in (0, 1, 2)), "a decoding sequence missed a step"


@of("burst")
def test_a_burst_waits_in_order_and_nobody_for_the_whole_batch(run: Run) -> None:
    admitted = run.of("admitted")
    assert [event.request_id for event in admitted] == [f"request-{n}" for n in range(len(admitted))]
    assert right(run) == "3"
    late = admitted[4:]
    assert len(late) > 3
    ends = {step_of(run, event) for event in run.of("finished")}
    assert all(step_of(run, event) - 1 in ends for event in late), "a request starts when another ends"
    assert not run.of("preempted")


@of("batchllm")
def test_a_batch_runs_in_groups_whose_beginnings_are_kept(run: Run) -> None:
    groups = {event.group: event for event in run.of("group_started")}
    assert sorted(len(event.request_ids) for event in groups.values()) == [3, 3, 4]
    first: dict[str, int] = {}
    for event in run.of("admitted"):
        first.setdefault(event.request_id, event.num_cached)
    for event in groups.values():
        leader, *others = (first[request_id] for request_id in event.request_ids)
        assert leader == 0 and others == [16 * event.num_blocks] * len(others)
    assert len(run.of("prefix_kept")) == len(run.of("prefix_released")) == len(run.of("group_ended")) == 3
    assert run.of("preempted") and max(map(len, running_at_once(run))) > 4, "memory is the limit, not max_num_seqs"
    assert not run.state.groups and len(run.state.finished) == 10
    steps: list[list[int]] = []  # tokens of requests that join a group, without shared ones
    for event in run.events:
        if event.type == "step_started":
            steps.append([])
        elif event.type == "admitted" and event.num_cached:
            steps[-1].append(len(run.prompts[event.request_id]) - event.num_cached)
    assert right(run) == str(sum(next(own for own in steps if len(own) > 1)))


def free_pieces(state: State) -> list[int]:
    """Lengths of contiguous runs of free blocks."""
    return [len(piece) for piece in "".join("x" if count else "." for count in state.ref_counts).split("x") if piece]


def waits_of(run: Run, seq_id: int) -> list[tuple[int, int]]:
    """For each step in which the sequence waits: the number of free blocks, and the longest run of them."""
    assert run.state.config["memory"] == "orca-pow2"
    state, waits = State(), []
    state.apply(EngineStarted(**run.state.config))
    for event in run.events:
        state.apply(event)
        if event.type == "step_finished" and state.seqs.get(seq_id) and state.seqs[seq_id].request_id in state.waiting:
            pieces = free_pieces(state)
            waits.append((sum(pieces), max(pieces, default=0)))
    return waits


@of("fragmentation")
def test_a_request_waits_for_a_hole_although_enough_is_free(run: Run) -> None:
    last = run.of("request_added")[-1]
    (seq_id,) = last.seq_ids
    waits = [(free, longest) for free, longest in waits_of(run, seq_id) if longest < 16]
    assert len(waits) > 24, "it should wait at least two seconds"
    # It needs nine blocks or more for its prompt and 128 tokens; half of the pool is free, in runs of eight blocks.
    assert 8 * 16 < len(last.prompt_token_ids) + 128 <= 16 * 16
    assert set(waits) == {(24, 8)}
    (admitted,) = [event for event in run.of("admitted") if event.seq_id == seq_id]
    table = [event.block for event in run.of("allocated") if event.seq_id == seq_id]
    assert table == list(range(table[0], table[0] + 16)) and step_of(run, admitted) < STEPS
    assert right(run) == "G waits" and not run.of("preempted") and not run.of("copied")


@of("without-holes")
def test_paging_serves_the_same_requests_without_waiting(run: Run) -> None:
    last = run.of("request_added")[-1]
    (seq_id,) = last.seq_ids
    following = run.events[run.events.index(last) :]
    admitted = next(event for event in following if event.type == "admitted")
    assert admitted.seq_id == seq_id and [e.type for e in following].index("step_finished") > following.index(admitted)
    assert max(map(len, running_at_once(run))) == 6
    assert right(run) == "1"


@of("speculation")
def test_who_guesses_right_overtakes_and_wrong_guesses_are_taken_back(run: Run) -> None:
    told, ends = run.of("speculated"), {event.seq_id: step_of(run, event) for event in run.of("finished")}
    said = [run.state.seqs[seq].tokens[run.state.seqs[seq].num_prompt :] for seq in (0, 1)]
    assert said[0] == said[1] and ends[1] < ends[0] - 10, "B arrived later and ended long before A"
    assert sum(event.accepted for event in told if event.seq_id == 1) > 15
    wrong = [event for event in told if event.accepted < event.proposed and event.seq_id in (2, 3)]
    assert {event.seq_id for event in wrong} == {2, 3} and any(event.blocks for event in wrong)
    first = next(event for event in wrong if event.accepted)
    assert right(run) == str(first.accepted + 1)


def test_the_two_scenarios_about_holes_have_the_same_requests() -> None:
    contiguous, paged = SCENARIOS["fragmentation"], SCENARIOS["without-holes"]
    assert contiguous.arrivals == paged.arrivals
    assert contiguous.settings["num_blocks"] == paged.settings["num_blocks"]


@pytest.mark.parametrize("key", SCENARIOS)
@pytest.mark.parametrize(
    "home",
    [
        {"memory": "orca-max", "batching": "static"},
        {"preemption": "swap", "swap_blocks": 8, "enable_prefix_caching": True},
        {"enable_prefix_caching": False},
        {"eviction_policy": LRU},
        {"eviction": "fifo"},
    ],
    ids=["contiguous", "swap", "no cache", "policy", "fifo"],
)
def test_a_scenario_brings_what_it_is_about(key: str, home: dict[str, Any]) -> None:
    config = replace(EngineConfig(**home), **SCENARIOS[key].settings)
    assert config.batching == "continuous" and (config.memory == "paged") == (key != "fragmentation")


@pytest.mark.parametrize("run", SCENARIOS, indirect=True)
def test_texts_and_choices_are_fit_to_be_shown(run: Run, request: pytest.FixtureRequest) -> None:
    scenario = SCENARIOS[request.node.callspec.params["run"]]
    assert 200 < len(scenario.watch) < 400 and 3 <= scenario.watch.count(". ") + 1 <= 5
    assert run.question and 2 <= len(run.question["choices"]) <= 4
    assert len(set(run.question["choices"])) == len(run.question["choices"])
    assert len(run.question["text"]) + sum(map(len, run.question["choices"])) < 190 and len(run.verdict["why"]) < 200


def test_only_the_opening_does_not_ask() -> None:
    assert [key for key, scenario in SCENARIOS.items() if not scenario.asks] == ["opening"]
    assert [entry["key"] for entry in menu()] == list(SCENARIOS)
    for scenario in SCENARIOS.values():
        steps = [arrival.at_step for arrival in scenario.arrivals]
        assert steps == sorted(steps)
