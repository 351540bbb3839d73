"""The plug-ins in examples/: short, right, and taken by `LLM(...)` and by the page."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.cli import main
from minipaged.core.seams import FCFS
from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.events import State
from tests.fake import fake_engine, unbatched
from visualizer.paced_loop import PacedLoop
from visualizer.plugins import KEY, load_plugin
from visualizer.scenarios import SCENARIOS, menu

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
LONG = {"max_tokens": 12, "ignore_eos": True}
SCENE = "SETTINGS = {{}}\nSCENARIO = {{'name': 'x', 'watch': '', 'arrivals': [{}]}}"


@pytest.fixture(autouse=True)
def menu_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the tracer writes its file when the program ends
    yield
    SCENARIOS.pop(KEY, None)


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def run(engine):
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
        engine.check()
    return done


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_short_and_can_be_plugged_in(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 80
    settings, scenario = load_plugin(file)
    EngineConfig(**settings)
    assert (scenario is None) == (KEY not in {one["key"] for one in menu()})


def test_there_are_four():
    assert [file.stem for file in FILES] == ["granite", "least_often_used", "priorities", "tracer"]


# --- priorities ---------------------------------------------------------------------------------------------------


def test_urgent_requests_pass_the_queue_and_push_others_out():
    engine = fake_engine(num_blocks=8, block_size=4, max_num_seqs=2, admission_policy=module("priorities").Priorities)
    state, order, victims = State(), [], []
    state.apply(engine.started_event())

    def listen(event):
        state.apply(event)
        if event.type == "admitted":
            order.append(event.request_id)
        elif event.type == "preempted":
            victims.append(event.request_id)

    engine.events.subscribe(listen)
    asked = {
        "job": ([1] * 9, {"priority": 2}),
        "other job": ([2] * 9, {"priority": 2}),
        "late": ([3] * 3, {"priority": 0, "deadline": 90}),
        "soon": ([4] * 3, {"priority": 0, "deadline": 5}),
        "plain": ([5] * 3, {}),
    }
    long = {"max_tokens": 16, "ignore_eos": True}
    params = {name: SamplingParams(extra_args=extra, **long) for name, (_, extra) in asked.items()}
    for name, (prompt, _) in asked.items():
        engine.add_request(name, prompt, params[name])
        if name == "other job":
            engine.step()
            engine.step()
        assert state.waiting == [request.request_id for request in engine.scheduler.waiting]
    assert state.waiting == ["soon", "late", "plain"]
    done = run(engine)
    assert set(victims) <= {"job", "other job", "plain"} and victims
    first = {name: order.index(name) for name in asked}
    assert first["soon"] < first["late"] < first["plain"]
    assert done == {name: unbatched(prompt, params[name], 0, 200) for name, (prompt, _) in asked.items()}


def test_swapped_requests_keep_their_rank():
    policy = module("priorities").Priorities
    engine = fake_engine(num_blocks=8, block_size=4, preemption="swap", admission_policy=policy)
    for name, priority in (("b", 1), ("a", 0), ("c", 2)):
        engine.add_request(name, [ord(name) % 50] * 8, SamplingParams(extra_args={"priority": priority}, **LONG))
    modes = []
    engine.events.subscribe(lambda event: modes.append(event.seq_id) if event.type == "swapped_out" else None)
    assert set(run(engine)) == {"a", "b", "c"} and modes


@pytest.mark.parametrize("extra", [{"priority": -1}, {"priority": 1.5}, {"deadline": "soon"}, {"prority": 1}])
def test_what_the_policy_cannot_read_is_refused(extra):
    engine = fake_engine(admission_policy=module("priorities").Priorities)
    with pytest.raises(InvalidRequest, match="extra_args"):
        engine.add_request("a", [1], SamplingParams(extra_args=extra))
    assert not engine.has_unfinished()
    with pytest.raises(InvalidRequest, match="does not read 'priority'"):
        fake_engine().add_request("a", [1], SamplingParams(extra_args={"priority": 1}))
    with pytest.raises(InvalidRequest, match="extra_args must be a mapping"):
        SamplingParams(extra_args=["priority"])


# --- the other three ----------------------------------------------------------------------------------------------


def test_blocks_that_are_hit_often_outlive_those_that_are_not():
    policy = module("least_often_used").LeastOftenUsed
    found = {}
    for name, settings in (("lru", {}), ("least often", {"eviction_policy": policy})):
        engine, found[name] = fake_engine(num_blocks=10, block_size=4, max_num_seqs=1, **settings), 0
        cached = []

        def listen(event, cached=cached):
            if event.type == "admitted":
                cached.append(event.num_cached)

        engine.events.subscribe(listen)
        engine.add_request("first", [9] * 9, SamplingParams(max_tokens=1, ignore_eos=True))
        for i in range(6):
            engine.add_request(f"question-{i}", [9] * 8 + [i], SamplingParams(max_tokens=1, ignore_eos=True))
            for part in range(2):
                story = [20 + 2 * i + part] * 8
                engine.add_request(f"story-{i}-{part}", story, SamplingParams(max_tokens=20, ignore_eos=True))
        run(engine)
        found[name] = sum(cached)
    assert found["least often"] > found["lru"]


def test_the_tracer_writes_a_trace(tmp_path):
    tracer = module("tracer").Tracer(tmp_path / "trace.json")
    engine = fake_engine(num_blocks=9, block_size=4, preemption="swap", subscribers=[tracer])
    for name in "abc":
        engine.add_request(name, [ord(name) % 50] * 7, SamplingParams(n=2, **LONG))
    run(engine)
    assert not tracer.tables and not tracer.open
    tracer.save()
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in trace}
    assert {"waiting", "running", "preempted", "blocks", "step 0"} <= names
    depth: dict = {}
    for event in trace:  # on every row, what begins ends
        row = event["pid"], event["tid"]
        depth[row] = depth.get(row, 0) + {"B": 1, "E": -1, "C": 0}[event["ph"]]
        assert depth[row] in (0, 1)
    assert not any(depth.values()) and [e["ts"] for e in trace] == sorted(e["ts"] for e in trace)
    assert any(event["ph"] == "C" and event["args"]["shared"] for event in trace)


def test_granite_equals_transformers(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, embedding_multiplier=6.0, attention_multiplier=0.3,
        residual_multiplier=0.4, logits_scaling=3.0, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    theirs = GraniteForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", num_blocks=16, model_families=module("granite").FAMILY)
    prompt = [5, 9, 33, 2, 71, 8]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    (ours,) = llm.generate([prompt], params)[0].outputs
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + ours.token_ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == ours.token_ids
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ours.token_ids)[:, None])[:, 0].tolist()
    got = [entry[token] for entry, token in zip(ours.logprobs, ours.token_ids, strict=True)]
    assert got == pytest.approx(expected, abs=1e-4)


# --- the page -----------------------------------------------------------------------------------------------------


class Viewer:
    """A sink that keeps the events."""

    def started(self, event):
        self.events = []

    def publish(self, events):
        self.events += events

    def status(self, status):
        pass


@pytest.mark.parametrize("name, shows", [("priorities", "preempted"), ("least_often_used", "evicted")])
def test_a_plug_ins_scenario_shows_it_at_work(name, shows):
    settings, scenario = load_plugin(EXAMPLES / f"{name}.py")
    llm = LLM("tiny", device="cpu", max_num_batched_tokens=64, **settings)
    viewer = Viewer()
    thread = PacedLoop(llm, viewer, rate=None)
    future = thread.reset(scenario)
    thread._obey(*thread._commands.get())
    future.result(0)
    for _ in range(400):
        if not thread._has_work():
            break
        thread._advance()
    assert any(event.type == shows for event in viewer.events)
    if name == "priorities":
        first = {}
        for event in viewer.events:
            if event.type == "admitted":
                first.setdefault(event.request_id, len(first))
        assert len(first) == 5
        ranks = {event.request_id: event.rank for event in viewer.events if event.type == "request_added"}
        assert {ranks[event.request_id] for event in viewer.events if event.type == "preempted"} == {
            max(ranks.values())
        }
    else:
        assert any(event.type == "evicted" and "which is least" in event.reason for event in viewer.events)


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "no such file"),
        ("x = ", "cannot be imported: SyntaxError"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("SCENARIO = {}", "must define SETTINGS"),
        ("SETTINGS = []", "must define SETTINGS"),
        ("SETTINGS = {'num_block': 8}", "cannot have num_block; see"),
        ("SETTINGS = {'model': 'tiny'}", "cannot have model; choose the model with --model"),
        ("SETTINGS = {}\nSCENARIO = {'name': 'x'}", "'arrivals' is missing"),
        (SCENE.format(""), "needs arrivals"),
        (SCENE.format("{'step': 0, 'prompt': 'a', 'm': 1}"), "argument 'm'"),
        (SCENE.format("{'step': 0, 'prompt': 'a', 'n': 0}"), "n must be"),
        (SCENE.format("{'step': 2, 'prompt': 'a'}, {'step': 1, 'prompt': 'a'}"), "in the order of their steps"),
        ("SETTINGS = {}\nSCENARIO = 3", "SCENARIO is not one"),
    ],
)
def test_what_is_no_plug_in_is_refused(tmp_path, text, says, capsys, monkeypatch):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidConfig, match=says):
        load_plugin(path)
    monkeypatch.setattr(sys, "argv", ["minipaged", "visualize", "--plugin", str(path)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2 and "--plugin" in capsys.readouterr().err


def test_a_plug_in_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Job:\n    size: int\nSETTINGS = {'num_blocks': Job(20).size}\n"
    )
    assert load_plugin(path) == ({"num_blocks": 20}, None)


@pytest.mark.parametrize("others", [["--replay", "run.jsonl"], ["--lab", "A1"]])
def test_a_plug_in_goes_with_neither_a_recording_nor_a_lab(others, capsys, monkeypatch):
    plugin = ["--plugin", str(EXAMPLES / "tracer.py")]
    monkeypatch.setattr(sys, "argv", ["minipaged", "visualize", *plugin, *others])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2 and f"{others[0]} and --plugin exclude each other" in capsys.readouterr().err


def test_extra_args_with_names_of_any_type_are_refused():
    with pytest.raises(InvalidRequest, match="does not read 1"):
        fake_engine().add_request("a", [1], SamplingParams(extra_args={1: 2}))


@pytest.mark.parametrize("rank", [float("nan"), float("inf"), "first", None])
def test_a_rank_that_has_no_place_in_a_queue_is_refused(rank):
    class Odd(FCFS):
        def rank(self, request):
            return rank if request.request_id == "odd" else 0

    engine = fake_engine(admission_policy=Odd)
    engine.add_request("a", [1], SamplingParams(max_tokens=2))
    with pytest.raises(InvalidRequest, match="rank must be a number"):
        engine.add_request("odd", [1])
    assert not engine.is_unfinished("odd") and len(engine.scheduler.waiting) == 1
    while engine.has_unfinished():
        engine.step()
        engine.check()
