"""Attention weights for display: they sum to 1, and reading them does not change the engine's state."""

import math

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.features.attention_view import attention
from minipaged.kernels import reference
from tests.execution.test_reference import dense, paged
from tests.fake import fake_engine


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_weights_through_the_block_table_are_those_of_dense_attention(block_size, heads, kv_heads, window):
    lengths = [1, block_size, 37]
    k_cache, _, tables, contexts = paged(lengths, block_size, kv_heads, 8)
    q = torch.randn(len(lengths), heads, 8)
    for b, (k, v) in enumerate(contexts):
        weights = reference.attention_weights(q[b], k_cache, tables[b], len(k), 0.3, window)
        assert weights.shape == (heads, len(k))
        torch.testing.assert_close(weights.sum(-1), torch.ones(heads))
        values = v.repeat_interleave(heads // kv_heads, dim=1)
        out = torch.einsum("hl,lhd->hd", weights, values)
        torch.testing.assert_close(out[None], dense(q[b : b + 1], k, v, 0.3, window))


@pytest.fixture(scope="module")
def llm():
    settings = {"num_blocks": 32, "block_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    return LLM("tiny", enable_prefix_caching=False, **settings)  # so that two runs compute the same


def run(llm, look_every_step):
    """Runs three samples that share blocks. Returns all events."""
    engine, events, looks = llm.engine, [], 0
    stop = engine.events.subscribe(lambda e: events.append(e.to_dict() | {"seconds": 0}))
    params = SamplingParams(n=3, max_tokens=12, seed=5, temperature=1.0, ignore_eos=True, logprobs=2)
    engine.add_request("r", llm.encode("Once upon a time, there was a dragon"), params)
    first = engine.scheduler.running or engine.scheduler.waiting
    seqs = list(first[0].seqs)
    while engine.has_unfinished():
        engine.step()
        for seq in seqs if look_every_step else ():
            if seq.seq_id in engine.memory.tables:
                tables = engine.block_tables()
                caches = [t.clone() for t in engine.runner.kv_cache.k + engine.runner.kv_cache.v]
                for position in (0, seq.num_computed - 1):
                    weights = attention(engine, seq.seq_id, position)
                    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
                    looks += 1
                assert engine.block_tables() == tables
                assert all(map(torch.equal, caches, engine.runner.kv_cache.k + engine.runner.kv_cache.v))
        engine.check()
    stop()
    assert (looks > 10) == look_every_step
    return [tuple(seq.tokens) for seq in seqs], events


def test_looking_disturbs_nothing(llm):
    plain_tokens, plain = run(llm, look_every_step=False)
    tokens, looked = run(llm, look_every_step=True)
    assert tokens == plain_tokens
    assert [event["type"] for event in looked] == [event["type"] for event in plain]
    keys = ("text", "logprob", "top", "start", "num_tokens")
    assert [[e.get(k) for k in keys] for e in looked] == [[e.get(k) for k in keys] for e in plain]


def test_alternatives_are_told_only_where_asked_for(llm):
    _, events = run(llm, look_every_step=False)
    for event in events:
        if event["type"] == "sampled":
            assert len(event["top"]) == 2 and event["top"][0][2] >= event["top"][1][2]
            assert math.exp(event["top"][0][2]) <= 1
            assert event["logprob"] <= event["top"][0][2]
            assert all(isinstance(text, str) for _, text, _ in event["top"])
    seen = []
    stop = llm.engine.events.subscribe(seen.append)
    llm.generate("Once", SamplingParams(max_tokens=2))
    stop()
    assert [event.top for event in seen if event.type == "sampled"] == [[], []]


def test_where_there_is_nothing_to_see_it_says_why(llm):
    engine = llm.engine
    engine.add_request("r", llm.encode("Once upon a time"), SamplingParams(max_tokens=8))
    (seq,) = engine.scheduler.waiting[0].seqs
    with pytest.raises(InvalidRequest, match="no blocks yet"):
        attention(engine, seq.seq_id, 0)
    engine.step()
    with pytest.raises(InvalidRequest, match="next step"):
        attention(engine, seq.seq_id, len(seq.tokens) - 1)
    with pytest.raises(InvalidRequest, match="none at position"):
        attention(engine, seq.seq_id, 99)
    with pytest.raises(InvalidRequest, match="none at position"):
        attention(engine, seq.seq_id, -1)
    engine.abort("r")
    with pytest.raises(InvalidRequest, match="has ended"):
        attention(engine, seq.seq_id, 0)
    fake = fake_engine()
    fake.add_request("r", [1, 2, 3], SamplingParams(max_tokens=8))
    fake.step()
    with pytest.raises(InvalidRequest, match="without a model"):
        attention(fake, 0, 0)
