"""The fuzz test with real models: with any memory settings, the tokens are those of transformers."""

from collections import Counter
from importlib.resources import files
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

from minipaged.build import build_engine
from minipaged.config import EngineConfig, SamplingParams
from minipaged.events.waste import AHEAD
from minipaged.models.loader import load_model
from tests.checkpoints import save_llama

WEIGHTS = files("minipaged") / "tiny" / "weights"
LONGEST = 20  # output tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on such small models, more threads are slower
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return str(save_llama(tmp_path_factory.mktemp("llama"), vocab_size=100, **sizes))


def some_prompts():
    """Twelve prompts; eight share a prefix."""
    random = Random(0)
    stem = [random.randrange(3, 100) for _ in range(13)]
    lengths = (1, 3, 4, 8, 11, 16)
    return [
        (stem if i % 3 else [])[: length + 4] + [random.randrange(3, 100) for _ in range(length)]
        for i, length in enumerate(lengths * 2)
    ]


@torch.inference_mode()
def greedy(directory: str, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt with the tokens that transformers generates greedily, past end-of-text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(LONGEST):
            (best, second), (token, _) = model(torch.tensor([tokens])).logits[0, -1].topk(2)
            assert best - second > 1e-4, "the two largest logits nearly tie, so rounding would decide this token"
            tokens.append(int(token))
        rows.append(tokens)
    return rows


class Trace:
    """A random engine on a real model, and requests for prefixes of the sequences that transformers generated."""

    def __init__(self, seed, loaded, prompts, truth):
        self.random = random = Random(seed)
        self.prompts, self.truth = prompts, truth
        block_size = random.choice((1, 3, 4, 5, 8, 16, 24))
        max_num_seqs = random.randint(2, 5)
        if random.random() < 0.2:  # contiguous memory; at least two of the longest fit
            memory, slots = {"memory": random.choice(AHEAD)}, random.randint(260, 400)
        else:
            memory, slots = {"enable_prefix_caching": random.random() < 0.7}, random.randint(48, 130)
            memory["preemption"] = random.choice(("recompute", "swap"))
        config = EngineConfig(
            block_size=block_size,
            num_blocks=max(3, slots // block_size),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + random.randint(0, 24),
            max_model_len=100,
            batching=random.choice(("continuous", "continuous", "static")),
            device="cpu",
            **memory,
        )
        self.engine = build_engine(config, loaded)
        self.seen = Counter([config.memory, config.batching])
        self.engine.events.subscribe(lambda event: self.seen.update([event.type]))

    def run(self):
        engine, random = self.engine, self.random
        arrivals = sorted(random.randint(0, 8) for _ in range(random.randint(2, 6)))
        asked, done = {}, {}
        for step in range(500):
            while arrivals and arrivals[0] <= step:
                arrivals.pop(0)
                name, which = f"r{len(asked)}", random.randrange(len(self.prompts))
                params = SamplingParams(
                    temperature=0, ignore_eos=True, n=random.choice((1, 1, 2)), max_tokens=random.randint(1, LONGEST)
                )
                engine.add_request(name, self.prompts[which], params)
                asked[name] = (which, params)
            if asked and random.random() < 0.03:
                output = engine.abort(random.choice(list(asked)))
                if output:
                    done[output.request_id] = output
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
            engine.check()
            if not arrivals and not engine.has_unfinished():
                break
        else:
            raise AssertionError("no progress")
        assert engine.memory.pool.num_free == engine.num_blocks and done.keys() == asked.keys()
        for name, (which, params) in asked.items():
            for out in done[name].outputs:
                assert out.token_ids == self.truth[which][: len(out.token_ids)], name
                self.seen["cut"] += len(out.token_ids) < params.max_tokens  # by an abort or the size of the pool
        return self.seen


def fuzz(directory, seeds):
    loaded, prompts = load_model(directory, "cpu", "float32"), some_prompts()
    truth = [row[len(prompt) :] for row, prompt in zip(greedy(directory, prompts), prompts, strict=True)]
    totals = Counter()
    for seed in seeds:
        try:
            totals += Trace(seed, loaded, prompts, truth).run()
        except Exception as error:
            error.add_note(f"trace {seed}")
            raise
    return totals


def test_random_traces_give_the_tokens_of_transformers(checkpoint):
    totals = fuzz(checkpoint, range(300))
    rare = ["preempted", "swapped_in", "copied", "forked", "cached", "shared", "evicted", "cut"]
    assert not [name for name in [*rare, "static"] if totals[name] < 20], totals
    assert all(totals[memory] for memory in AHEAD), totals


def test_random_traces_give_the_tokens_of_transformers_on_the_embedded_model():
    totals = fuzz(str(WEIGHTS), range(1000, 1030))
    assert totals["preempted"] and totals["copied"] and totals["evicted"], totals
