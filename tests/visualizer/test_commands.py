"""Scenarios, predictions, settings and chat turns as commands, on a real engine and without a browser."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from minipaged import LLM, EngineConfig, SamplingParams
from tests.aio import run
from tests.fake import swap_of
from visualizer import paced_loop
from visualizer.commands import MAX_CHARACTERS, MAX_MESSAGES, Commands
from visualizer.log import RecordLog
from visualizer.paced_loop import PacedLoop
from visualizer.scenarios import DEMO_SETTINGS as SETTINGS
from visualizer.scenarios import OPENING

SAY = {"do": "chat", "temperature": 0.5, "max_tokens": 5}
SUBMIT = {"do": "submit", "prompt": "Once upon", "n": 1, "temperature": 0.5, "max_tokens": 5}


@pytest.fixture(scope="module")
def model() -> tuple[LLM, EngineConfig]:
    """A model for this file only, because its tests replace the engine."""
    llm = LLM(os.environ.get("MINIPAGED_TEST_MODEL", "tiny"), **SETTINGS)
    return llm, llm.engine.config


@pytest.fixture
def llm(model: tuple[LLM, EngineConfig]) -> LLM:
    llm, config = model
    llm.engine = llm.build_engine(config)
    return llm


@pytest.fixture
def thread(llm: LLM) -> Iterator[PacedLoop]:
    thread = PacedLoop(llm, RecordLog(), rate=None)
    thread.start()
    yield thread
    thread.stop()


def ask(thread: PacedLoop, payload: dict[str, Any], load: Any = None) -> dict[str, Any]:
    return run(Commands(thread, OPENING, load)(payload))


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def now(thread: PacedLoop) -> dict[str, Any]:
    return thread._sink._status


def test_the_models_own_sampling_parameters_apply_where_the_viewer_gives_none(thread: PacedLoop, monkeypatch) -> None:
    assert now(thread)["sampling"]["temperature"] == 0.8, "as generation_config.json of the embedded model says"
    monkeypatch.setattr(thread.llm, "generation_config", None)
    monkeypatch.setattr(thread.llm, "default_params", SamplingParams(top_k=20, repetition_penalty=1.1))
    assert paced_loop.own_sampling(thread.llm)["temperature"] == 0.7
    arrivals = []
    monkeypatch.setattr(thread, "submit", lambda arrival: arrivals.append(arrival) or Future())
    commands = Commands(thread, OPENING)
    for more in ({}, {"top_k": 3}, {"beam_width": 2, "temperature": 0}):
        commands._dispatch(SUBMIT | more)
    assert [(a.top_k, a.repetition_penalty) for a in arrivals] == [(20, 1.1), (3, 1.1), (0, 1.0)]


def test_a_scenario_brings_its_own_engine_and_applied_settings_stay(thread: PacedLoop) -> None:
    assert ask(thread, {"do": "play", "scenario": "burst"})["ok"]
    assert thread.engine.num_blocks == 48 and thread.engine.config.max_num_seqs == 4
    assert now(thread)["scenario"] == "burst" and now(thread)["asks"]
    assert thread._sink.state.config["num_blocks"] == 48
    answer = ask(thread, {"do": "configure", "num_blocks": 40, "preemption": "swap", "swap_blocks": 8})
    assert answer["ok"] and "40 blocks" in answer["result"] and now(thread)["scenario"] is None
    assert swap_of(thread.engine).space.pool.num_blocks == 8 and not thread._has_work()
    ask(thread, {"do": "play"})
    assert thread.engine.num_blocks == 40, "replay must keep applied settings"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_blocks": 0}, "num blocks"),
        ({"num_blocks": 10**9}, "num blocks"),
        ({"block_size": "x"}, "block size"),
        ({"block_size": ""}, "block size"),
        ({"preemption": "pray"}, "preemption"),
        ({"memory": "malloc"}, "memory must be one of paged"),
        ({"memory": ["paged"]}, "memory must be one of"),
        ({"memory": None}, "memory must be one of"),
        ({"batching": "dynamic"}, "batching must be one of"),
        ({"memory": "orca-max", "enable_prefix_caching": True}, "neither shares prefixes"),
        ({"memory": "orca-pow2", "preemption": "swap"}, "neither shares prefixes"),
        ({"memory": "orca-max", "block_size": 256, "num_blocks": 4096, "max_num_seqs": 0}, "max num seqs"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching"),
        ({"max_num_batched_tokens": 2}, "at least max_num_seqs"),
        ({"model": ""}, "model"),
        ({"model": "no/such/model"}, "no directory"),
        ({"model": 7}, "text"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_model_len": 2000}, "supports 1024"),
        ({"kv_memory": "2gib"}, "kv memory must be a number of bytes"),
        ({"kv_memory": 5}, "text"),
        ({"kv_memory": "10"}, "holds no kv block"),
        ({"kv_memory": "1GiB"}, "16,384 blocks; this page shows at most 4,096"),
        ({"kv_memory": "4MiB", "num_blocks": 64}, "exclude each other"),
    ],
)
def test_bad_settings_get_words_and_the_old_engine_goes_on(thread: PacedLoop, change: dict, words: str) -> None:
    engine = thread.engine
    answer = ask(thread, {"do": "configure"} | change, load=LLM_OF)
    assert not answer["ok"] and words in answer["message"].lower()
    until(lambda: not now(thread).get("loading"))
    assert thread.engine is engine and ask(thread, SUBMIT)["ok"]


def test_the_pool_can_be_sized_in_bytes(thread: PacedLoop) -> None:
    answer = ask(thread, {"do": "configure", "kv_memory": "4MiB", "max_model_len": 200, "max_num_seqs": 3})
    assert answer["ok"] and "64 blocks" in answer["result"]
    assert (thread.engine.num_blocks, thread.engine.max_model_len, thread.engine.config.max_num_seqs) == (64, 200, 3)
    assert ask(thread, {"do": "configure", "max_model_len": None, "kv_memory": ""})["ok"]
    assert (thread.engine.num_blocks, thread.engine.max_model_len) == (64, 1024), "the model's own length again"
    assert ask(thread, {"do": "configure", "model": "another", "max_model_len": 150}, LLM_OF_TINY)["ok"]
    assert thread.engine.max_model_len == 150
    assert ask(thread, {"do": "configure", "model": "a third"}, LLM_OF_TINY)["ok"]
    assert thread.engine.max_model_len == 1024


def LLM_OF_TINY(**settings: Any) -> LLM:
    return LLM(**(settings | {"model": "tiny"}))


def LLM_OF(**settings: Any) -> LLM:
    return LLM(**settings)


def test_another_model_is_loaded_beside_the_engine_and_only_where_allowed(thread: PacedLoop) -> None:
    refused = ask(thread, {"do": "configure", "model": "other"})
    assert not refused["ok"] and "open to other machines" in refused["message"]
    old, seen = thread.llm, []

    def load(**settings: Any) -> LLM:
        seen.append((settings["model"], now(thread)["loading"], thread.call(lambda: "alive").result(5)))
        return LLM(**(settings | {"model": "tiny"}))

    assert ask(thread, {"do": "configure", "model": "other", "num_blocks": 24}, load)["ok"]
    assert seen == [("other", "other", "alive")] and thread.llm is not old and thread.engine.num_blocks == 24
    until(lambda: now(thread)["loading"] == "")
    assert ask(thread, SUBMIT)["ok"]


@pytest.mark.parametrize(
    "payload, words",
    [
        (SUBMIT | {"top_p": 0}, "top_p"),
        (SUBMIT | {"top_k": 1.5}, "top_k"),
        (SUBMIT | {"min_p": "?"}, "min_p"),
        (SUBMIT | {"seed": -1}, "seed"),
        (SUBMIT | {"repetition_penalty": 0}, "repetition_penalty"),
        (SUBMIT | {"presence_penalty": "?"}, "presence_penalty"),
        (SUBMIT | {"frequency_penalty": True}, "frequency_penalty"),
        (SUBMIT | {"min_tokens": 1.5}, "min_tokens"),
        (SUBMIT | {"min_tokens": 6}, "min_tokens (6) is above max_tokens (5)"),
        (SUBMIT | {"stop": "the"}, "list"),
        (SUBMIT | {"stop": ["the", ""]}, "none of them empty"),
        (SUBMIT | {"stop": [3]}, "text"),
        (SUBMIT | {"stop": ["x" * 201]}, "200"),
        (SUBMIT | {"stop": ["x"] * 21}, "20"),
        (SUBMIT | {"beam_width": 2, "temperature": 0, "min_tokens": 2}, "beam search"),
        (SUBMIT | {"beam_width": 2, "temperature": 0, "stop": ["the"]}, "beam search"),
        (SUBMIT | {"beam_width": 2, "temperature": 0, "presence_penalty": 1}, "beam search"),
        ({"do": "check", "top_p": 3}, "top_p"),
        (SUBMIT | {"beam_width": 2}, "temperature=0"),
        (SUBMIT | {"beam_width": 9, "temperature": 0}, "beams"),
        (SUBMIT | {"beam_width": 2, "n": 3, "temperature": 0}, "above beam_width"),
        (SAY, "messages"),
        (SAY | {"messages": []}, "messages"),
        (SAY | {"messages": ["hi"]}, "messages"),
        (SAY | {"messages": [{"role": "judge", "content": "x"}, {"role": "user", "content": "x"}]}, "role"),
        (SAY | {"messages": [{"role": "assistant", "content": "x"}]}, "user's"),
        (SAY | {"messages": [{"role": "user"}]}, "content"),
        (SAY | {"messages": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}, "new one"),
        (SAY | {"messages": [{"role": "user", "content": "x" * (MAX_CHARACTERS // 2 + 1)}] * 2}, "new one"),
        ({"do": "play", "scenario": "none such"}, "no scenario"),
        ({"do": "play", "scenario": 3}, "text"),
        ({"do": "answer", "id": "x"}, "number"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(thread: PacedLoop, payload: dict, words: str) -> None:
    answer = ask(thread, payload)
    assert not answer["ok"] and words in answer["message"].lower(), answer
    assert not thread._sink.state.requests


REFINED_VALUES = {
    "top_k": 7, "top_p": 0.5, "min_p": 0.01, "repetition_penalty": 1.5, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "stop": ["\n", "the end"], "min_tokens": 3, "seed": 11,
}  # fmt: skip


def test_all_that_is_refined_reaches_the_engine(thread: PacedLoop) -> None:
    thread.pause().result(5)
    request_id = ask(thread, SUBMIT | REFINED_VALUES)["result"]
    chat = SAY | {"messages": [{"role": "user", "content": "Hello"}]}
    for name in (request_id, ask(thread, chat | REFINED_VALUES)["result"]):
        params = next(group for group in thread.engine.scheduler.waiting if group.request_id == name).params
        for field, value in REFINED_VALUES.items():
            assert getattr(params, field) == (tuple(value) if field == "stop" else value), field
    assert ask(thread, {"do": "check"} | REFINED_VALUES) == {"ok": True, "result": sorted(REFINED_VALUES)}


def test_min_tokens_and_stop_do_what_they_say(thread: PacedLoop) -> None:
    story = SUBMIT | {"max_tokens": 60, "seed": 3}
    texts = {}
    for name, change in {"free": {}, "stopped": {"stop": ["."]}, "long": {"min_tokens": 60}}.items():
        request_id = ask(thread, story | change)["result"]
        until(lambda: not thread.call(thread._has_work).result(5))
        (seq_id,) = thread._sink.state.requests[request_id]
        seq = thread._sink.state.seqs[seq_id]
        texts[name] = "".join(seq.pieces[seq.num_prompt :])
        if name == "long":
            assert len(seq.tokens) - seq.num_prompt == 60 and seq.finish_reason == "length"
        if name == "stopped":
            assert seq.finish_reason == "stop"
    assert "." in texts["free"] and texts["free"].startswith(texts["stopped"].partition(".")[0])
    assert texts["stopped"].count(".") <= 1 and len(texts["stopped"]) < len(texts["free"])


@pytest.mark.parametrize(
    "payload, field",
    [
        ({"do": "check", "top_k": -1}, "top_k"),
        ({"do": "check", "top_k": "abc"}, "top_k"),
        ({"do": "check", "min_tokens": 500, "stop": [""]}, "stop"),
        ({"do": "check", "repetition_penalty": -1}, "repetition_penalty"),
        (SUBMIT | {"max_tokens": 0}, "max_tokens"),
        ({"do": "configure", "num_blocks": "many"}, "num_blocks"),
        ({"do": "configure", "model": 3}, "model"),
        ({"do": "configure", "kv_memory": "much"}, "kv_memory"),
    ],
)
def test_the_field_that_is_wrong_is_named(thread: PacedLoop, payload: dict, field: str) -> None:
    assert ask(thread, payload)["field"] == field


def test_what_two_fields_make_wrong_together_is_neithers_fault(thread: PacedLoop) -> None:
    assert "field" not in ask(thread, SUBMIT | {"min_tokens": 6})
    assert ask(thread, {"do": "check", "min_tokens": 500})["ok"], "this is invalid only with the prompt's max_tokens"


def test_a_question_holds_a_step_back_until_it_is_answered_or_time_is_up(
    thread: PacedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(thread, {"do": "play", "scenario": "samples"})
    until(lambda: now(thread)["question"])
    end = thread._sink.end
    ask(thread, SUBMIT)  # requests of other viewers wait, too, in their order
    ask(thread, {"do": "answer", "id": 99})
    assert now(thread)["question"] and thread._sink.end == end
    ask(thread, {"do": "answer", "id": now(thread)["question"]["id"]})
    assert now(thread)["verdict"] and not now(thread)["question"]
    until(lambda: not thread.call(thread._has_work).result(5))
    thread.call(thread.engine.check).result(5)

    monkeypatch.setattr(paced_loop, "TIME_TO_ANSWER", 0.05)
    ask(thread, {"do": "play", "scenario": "samples"})
    until(lambda: now(thread)["verdict"])

    monkeypatch.setattr(paced_loop, "TIME_TO_ANSWER", 60)
    ask(thread, {"do": "play", "scenario": "samples"})
    until(lambda: now(thread)["question"])
    ask(thread, {"do": "asks", "asks": False})
    assert not now(thread)["question"] and now(thread)["verdict"]
