"""Plug-ins by public arguments: an admission policy, a stage, a subscriber, a model family."""

import pytest

from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.core.seams import FCFS, Stage
from minipaged.errors import InvalidConfig
from minipaged.models.llama import Llama, LlamaConfig
from tests.checkpoints import save_llama
from tests.fake import fake_engine, unbatched

LONG = SamplingParams(max_tokens=12, ignore_eos=True)


class ShortestPromptFirst(FCFS):
    """Admits the waiting request with the shortest prompt first."""

    def eligible(self, waiting):
        return sorted(waiting, key=lambda request: len(request.prompt_token_ids))


class Counter(Stage):
    """A stage that records the scheduler's calls."""

    def __init__(self):
        self.calls = []

    def before_admission(self, plan):
        self.calls.append("before_admission")
        return len(plan.chunks) < 2  # admits none if two sequences run

    def planned(self, plan):
        self.calls.append("planned")

    def sampled(self, request):
        self.calls.append("sampled")

    def committed(self, plan):
        self.calls.append("committed")

    def releasing(self, request, seq):
        self.calls.append("releasing")

    def finished(self, request):
        self.calls.append("finished")


def run(engine):
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
        engine.check()
    return done


def test_an_admission_policy_says_who_starts_next():
    engine, admitted = fake_engine(max_num_seqs=1, admission_policy=ShortestPromptFirst), []
    engine.events.subscribe(lambda e: admitted.append(e.request_id) if e.type == "admitted" else None)
    prompts = {"long": [1] * 9, "short": [2], "middle": [3] * 5}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, LONG)
    done = run(engine)
    assert admitted == ["short", "middle", "long"]
    assert done == {name: unbatched(prompt, LONG, 0, 200) for name, prompt in prompts.items()}


def test_a_policy_works_with_a_batch_in_groups_and_with_swapping():
    from minipaged.build import BatchItem

    engine = fake_engine(num_blocks=9, preemption="swap", admission_policy=ShortestPromptFirst)
    items = [BatchItem(f"b{i}", [5] * 8 + [i], LONG) for i in range(3)]
    engine.add_batch(items)
    engine.add_request("other", [7] * 4, LONG)
    done = run(engine)
    assert done["other"] == unbatched([7] * 4, LONG, 0, 200)
    assert all(done[item.request_id] == unbatched(item.prompt_token_ids, LONG, 0, 200) for item in items)


def test_a_stage_is_called_at_every_turn():
    engine = fake_engine(stages=[Counter])
    (stage,) = engine.scheduler.stages
    for name in "abcd":
        engine.add_request(name, [ord(name) % 50], LONG)
    done = run(engine)
    assert len(done) == 4 and stage.calls.count("finished") == stage.calls.count("releasing") == 4
    assert stage.calls.count("planned") == stage.calls.count("committed") == engine.scheduler.step
    assert stage.calls.count("sampled") == 48
    assert run(fake_engine(stages=[Counter, Counter])) == {}


def test_subscribers_hear_all_from_the_first_request_on_and_after_a_restart():
    from minipaged.build import rebuild

    heard = []
    engine = fake_engine(subscribers=[heard.append])
    engine.add_request("a", [1], LONG)
    assert [event.type for event in heard] == ["request_added"]
    rebuild(engine).add_request("b", [1], LONG)
    assert [event.request_id for event in heard] == ["a", "b"]


class Loud(Llama):
    """A user's model family: a Llama whose logits are doubled."""

    def forward(self, batch, kv_cache):
        return 2 * super().forward(batch, kv_cache)


def test_a_model_family_of_ones_own(tmp_path):
    import json

    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LoudForCausalLM"]}))
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 8}
    llm = LLM(str(tmp_path), model_families={"LoudForCausalLM": (Loud, LlamaConfig)}, **settings)
    assert type(llm._loaded.model) is Loud
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = LLM(str(tmp_path), **settings)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    loud, quiet = (one.generate([[1, 7, 9]], params)[0].outputs[0] for one in (llm, plain))
    assert loud.token_ids == quiet.token_ids and loud.cumulative_logprob > quiet.cumulative_logprob


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"admission_policy": FCFS()}, "not an instance"),
        ({"admission_policy": FCFS, "batching": "static"}, "leave admission_policy out"),
        ({"stages": Counter}, "a list of callables"),
        ({"stages": [Counter()]}, "a list of callables"),
        ({"subscribers": print}, "a list of callables"),
        ({"model_families": [Llama]}, "must map names"),
        ({"model_families": {"X": Llama}}, "must map names"),
        ({"model_families": {3: (Llama, LlamaConfig)}}, "must map names"),
    ],
)
def test_what_is_no_plug_in_is_refused_at_the_door(settings, says):
    with pytest.raises(InvalidConfig, match=says):
        EngineConfig(**settings)
