"""Whole engines on vAttention generate the same tokens as with paging."""

from collections import Counter
from random import Random

import pytest
import torch
import transformers

from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.build import build_engine
from minipaged.models.loader import load_model
from tests.models.families import LLAMA3_ROPE, randomize

LONGEST = 24
MAX_LEN = 100
# Sizes with which 16 tokens of a layer fill a page of 4096 bytes, so that contexts span several page-groups.
SHAPE = dict(
    vocab_size=131, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
)  # fmt: skip
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=131, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "llama3": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=21),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE | dict(hidden_size=128), tie_word_embeddings=True),
    "qwen3-window": lambda: transformers.Qwen3Config(
        **SHAPE,
        use_sliding_window=True,
        sliding_window=18,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on such small models, more threads are slower
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request, tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    randomize(model)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return load_model(str(directory), "cpu", "float32")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu", "float32")


def some_requests(random: Random, count: int, vocab: int) -> list[tuple[list[int], SamplingParams]]:
    """Random requests with greedy decoding, sampling and beam search; many prompts share a prefix."""
    stem = [random.randrange(3, vocab) for _ in range(40)]
    requests = []
    for i in range(count):
        prompt = stem[: random.choice((0, 17, 33, 40))] + [random.randrange(3, vocab)] * random.randint(1, 12)
        length = {"max_tokens": random.randint(1, LONGEST), "ignore_eos": True}
        kind = random.choice(("greedy", "sampled", "sampled", "beams"))
        if kind == "greedy":
            params = SamplingParams(temperature=0, **length)
        elif kind == "sampled":
            # Probabilities in the tail are nearly equal, so that rounding could change the token that is drawn.
            params = SamplingParams(n=random.randint(1, 3), top_k=8, seed=i, **length)
        else:
            params = SamplingParams(temperature=0, beam_width=3, n=2, **length)
        requests.append((prompt, params))
    return requests


def answers(engine, requests, random=None):
    """Tokens of every request, and counts of events. Requests arrive at random times if ``random`` is given."""
    seen: Counter[str] = Counter()
    engine.events.subscribe(lambda event: seen.update([event.type]))
    todo = [(str(i), *request) for i, request in enumerate(requests)][::-1]
    done: dict[str, list[list[int]]] = {}
    while todo or engine.has_unfinished():
        while todo and (random is None or not engine.has_unfinished() or random.random() < 0.3):
            engine.add_request(*todo.pop())
        for output in engine.step():
            if output.finished:
                done[output.request_id] = [out.token_ids for out in output.outputs]
        engine.check()
    return [done[str(i)] for i in range(len(requests))], seen


def paged_answers(loaded, requests):
    config = EngineConfig(num_blocks=2000, max_model_len=MAX_LEN, device="cpu", enable_prefix_caching=False)
    return answers(build_engine(config, loaded), requests)[0]


@pytest.mark.parametrize("tensor_slicing", [False, True], ids=["one tensor a layer", "tensor slicing"])
def test_every_family_gives_the_tokens_of_paging(loaded, tensor_slicing):
    requests = some_requests(Random(1), 14, 131)
    config = EngineConfig(
        memory="vattention", tensor_slicing=tensor_slicing, block_size=16, num_blocks=16, max_num_seqs=12,
        max_num_batched_tokens=50, max_model_len=MAX_LEN, device="cpu",
    )  # fmt: skip
    told, seen = answers(build_engine(config, loaded), requests)
    assert told == paged_answers(loaded, requests)
    assert seen["preempted"] and seen["shared"] and seen["copied"]


def test_random_traces_in_pools_too_small_give_the_tokens_of_paging(tiny):
    totals: Counter[str] = Counter()
    requests = some_requests(Random(7), 60, 1000)
    truth = dict(enumerate(paged_answers(tiny, requests)))
    for seed in range(24):
        random = Random(seed)
        mine = random.sample(range(len(requests)), 8)
        sliced = random.random() < 0.5
        block_size = random.choice((2, 6, 16, 26)) if sliced else random.choice((8, 16, 24))
        max_num_seqs = random.randint(4, 9)
        config = EngineConfig(
            memory="vattention",
            mapping=("sync", "eager", "async")[seed % 3],
            tensor_slicing=sliced,
            block_size=block_size,
            num_blocks=random.randint(130, 210) // block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + random.randint(0, 40),
            max_model_len=MAX_LEN,
            enable_prefix_caching=random.random() < 0.6,
            preemption=random.choice(("recompute", "swap")),
            device="cpu",
        )
        engine = build_engine(config, tiny)
        mine = [i for i in mine if fits(engine, *requests[i])]
        told, seen = answers(engine, [requests[i] for i in mine], random if seed % 2 else None)
        for i, tokens in zip(mine, told, strict=True):
            for out, expected in zip(tokens, truth[i], strict=True):
                if len(out) == len(expected):  # otherwise its request outgrew the pool
                    assert out == expected, f"trace {seed}, request {i}"
                    totals["whole"] += 1
        totals += seen
    rare = ["preempted", "swapped_out", "swapped_in", "copied", "forked", "shared", "cached", "evicted", "whole"]
    assert not [name for name in rare if totals[name] < 10], totals


def fits(engine, prompt, params):
    """Whether the pool can hold the request to its end: a beam search that is cut short gives other beams."""
    width = params.beam_width or params.n
    return engine.memory.blocks_for(len(prompt) + params.max_tokens + 1) * width <= engine.num_blocks


def test_what_an_earlier_owner_left_reaches_nobody(tiny):
    """Every byte of the pool is NaN before the first request."""
    engine = build_engine(EngineConfig(memory="vattention", num_blocks=30, max_model_len=MAX_LEN), tiny)
    for tensor in (*engine.runner.kv_cache.k, *engine.runner.kv_cache.v):
        tensor.fill_(torch.nan)
    requests = [([5 + i] * (20 + i), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)) for i in range(4)]
    assert answers(engine, requests)[0] == paged_answers(tiny, requests)


def test_an_llm_answers_on_virtual_memory_by_one_word():
    greedy = SamplingParams(temperature=0)
    paged, virtual = (LLM("tiny", memory=m).generate("Once upon a time", greedy)[0] for m in ("paged", "vattention"))
    assert paged.outputs == virtual.outputs
