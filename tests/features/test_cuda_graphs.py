"""Decoding with CUDA graphs, without a GPU: a closure that reads the same memory stands in for each graph."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.errors import InvalidConfig
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.runner import ModelRunner
from minipaged.features import cuda_graphs
from minipaged.features.cuda_graphs import DecodeGraphs, batch_sizes, use_graphs

PROMPTS = ["Once upon a time", "The robot", "In a small town by the sea,", "One day, a fox met an owl. Then"]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 12, 100, 255, 256, 257, 300, 1000])
def test_some_graph_covers_every_batch_and_little_of_it_is_padding(max_num_seqs):
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= batch)
        assert size - batch <= (7 if batch <= 256 else 31)


def replaying(recorded):
    """A stand-in for recording: like a graph, each replay reads its inputs' current contents and writes one output."""

    def record(forward):
        recorded.append(forward)
        logits = forward()
        return lambda: logits.copy_(forward()), logits

    return record


def with_graphs(llm, recorded):
    """Replaces the engine's runner by one with graphs and one more KV block."""
    engine, old = llm.engine, llm.engine.runner.kv_cache
    layers, shape = len(old.k), old.k[0].shape
    kv_cache = KVCache(layers, shape[0] + 1, *shape[1:], old.k[0].dtype, old.k[0].device)
    for tensor in kv_cache.k + kv_cache.v:
        tensor.fill_(torch.nan)  # so that a padding row that reads an unwritten slot is detected
    device = torch.device("cpu")
    graphs = DecodeGraphs(
        llm.engine.runner.model,
        kv_cache,
        device,
        max_num_seqs=engine.config.max_num_seqs,
        max_blocks=-(-engine.max_model_len // engine.config.block_size),
        scratch_block=engine.num_blocks,
        record=replaying(recorded),
    )
    engine.runner = ModelRunner(llm.engine.runner.model, kv_cache, device, graphs)
    return graphs


@pytest.mark.parametrize("block_size", [3, 16])
def test_tokens_are_the_same_with_graphs_and_each_size_is_recorded_once(block_size):
    params = [SamplingParams(temperature=0, max_tokens=6 + 5 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    params[1] = SamplingParams(n=3, seed=4, max_tokens=20, ignore_eos=True)
    # 7 is not a power of two, and the pool is small enough to cause preemptions.
    settings = {"max_num_seqs": 7, "num_blocks": 1 + 150 // block_size, "block_size": block_size, "max_model_len": 100}
    plain, graphed, recorded = LLM("tiny", **settings), LLM("tiny", **settings), []
    graphs = with_graphs(graphed, recorded)
    texts = [[[out.token_ids for out in o.outputs] for o in llm.generate(PROMPTS, params)] for llm in (plain, graphed)]
    assert texts[0] == texts[1]
    assert len(recorded) == len(graphs._graphs) >= 2 and set(graphs._graphs) <= {1, 2, 4, 7}


def test_padding_touches_no_block_of_a_sequence():
    llm = LLM("tiny", max_num_seqs=7, num_blocks=20, max_model_len=100)
    with_graphs(llm, [])
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm.generate(PROMPTS[:3], params)  # three rows and one padding row
    kv_cache = llm.engine.runner.kv_cache
    written = [block for block in range(20) if not kv_cache.k[0][block].isnan().all()]
    expected = sum(llm.engine.memory.blocks_for(len(llm.encode(p)) + 3) for p in PROMPTS[:3])
    assert len(written) == expected
    assert not kv_cache.k[0][20].isnan().all(), "padding writes to the scratch block"


def test_a_batch_in_groups_may_be_larger_than_any_graph():
    llm, recorded = LLM("tiny", max_num_seqs=2, num_blocks=40, max_model_len=100), []
    graphs = with_graphs(llm, recorded)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompts = [f"{PROMPTS[0]} {word}" for word in ("one", "two", "three")]
    running = []
    llm.engine.events.subscribe(lambda e: running.append(len(llm.engine.scheduler.running)))
    assert len(llm.generate(prompts, params, schedule="batchllm")) == 3
    assert max(running) == 3 and set(graphs._graphs) <= {1, 2}


def test_only_plain_decode_steps_are_replayed():
    one = torch.zeros(2, dtype=torch.int64)

    def batch(query_lens, rows, **more):
        decodes = sum(count == 1 for count in query_lens)
        return Batch(one, one, one, one[None], one, one[:1].expand(rows), query_lens, [5, 5], decodes, **more)

    covers = partial(DecodeGraphs.covers, SimpleNamespace(sizes=[1, 2]))
    assert covers(batch([1, 1], 2))
    assert not covers(batch([1, 1, 1], 3))  # larger than the largest graph
    assert not covers(batch([1, 4], 2))  # one of them is a prefill
    assert not covers(batch([1, 1], 1))  # a chunk of one prompt token that samples nothing
    assert not covers(batch([1, 1], 2, virtual_slots=[0, 1]))  # the contexts' addresses change in every step


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_graphs_are_used_where_they_can_be():
    auto, on, off = (EngineConfig(cuda_graphs=wanted) for wanted in (None, True, False))
    virtual = SimpleNamespace(cuda_graphs=None, memory="vattention")
    assert use_graphs(auto, "triton", CUDA) and use_graphs(on, "triton", CUDA)
    assert use_graphs(EngineConfig(memory="orca-max"), "triton", CUDA), "contiguous memory has block tables, too"
    for never in [(auto, "torch", CUDA), (auto, "flex", CUDA), (auto, "triton", CPU), (off, "triton", CUDA)]:
        assert not use_graphs(*never)
    assert not use_graphs(virtual, "triton", CUDA)
    for refused in [("torch", CUDA), ("triton", CPU), ("torch", CPU)]:
        with pytest.raises(InvalidConfig, match=f"{refused[1].type} with attention='{refused[0]}' .*; set device"):
            use_graphs(on, *refused)


def test_the_setting_is_checked_before_a_model_is_loaded():
    with pytest.raises(InvalidConfig, match="cuda_graphs must be True, False or None"):
        EngineConfig(cuda_graphs=1)
    with pytest.raises(InvalidConfig, match="cuda_graphs=True needs CUDA"):
        LLM("/no/such/model", device="cpu", cuda_graphs=True)
    assert not isinstance(LLM("tiny", num_blocks=8, device="cpu").engine.runner.forward, DecodeGraphs)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_engine_with_graphs_has_a_block_more_than_its_tables_know_of(monkeypatch, preemption):
    settings = {"max_num_seqs": 5, "num_blocks": 9, "preemption": preemption, "max_model_len": 100, "device": "cpu"}
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    plain, recorded, kinds = LLM("tiny", **settings), [], set()
    monkeypatch.setattr(cuda_graphs, "use_graphs", lambda *_: True)
    monkeypatch.setattr(cuda_graphs, "recorder", lambda: replaying(recorded))
    graphed = LLM("tiny", **settings)
    graphed.engine.events.subscribe(lambda event: kinds.add(event.type))
    for _ in range(2):  # in the second run, the prompts hit the prefix cache
        texts = [[out.outputs[0].token_ids for out in llm.generate(PROMPTS, params)] for llm in (plain, graphed)]
        assert texts[0] == texts[1]
    kv_cache = graphed.engine.runner.kv_cache
    assert graphed.engine.num_blocks == plain.engine.num_blocks == 9 and len(kv_cache.k[0]) == len(kv_cache.v[0]) == 10
    assert recorded and kv_cache.k[0][9].any(), "no step with padding was replayed"
    assert "preempted" in kinds and ("swapped_in" in kinds) == (preemption == "swap")
