"""int8 KV caches in plain torch: their error, and that scales move with their blocks."""

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.features.attention_view import attention
from minipaged.features.kv_int8 import Int8KVCache
from minipaged.features.swap.swap_runner import SwapSpace
from minipaged.kernels import reference
from tests.execution.test_reference import paged

PROMPTS = ["Once upon a time, there was a dragon who", "One day, a fox and a bear", "Once upon a time"]


def test_quantized_numbers_are_off_by_half_a_step_at_most():
    torch.manual_seed(0)
    x = torch.randn(50, 3, 33) * torch.logspace(-20, 20, 50)[:, None, None]
    x[0, 0] = 0
    quantized, scale = reference.quantize(x)
    assert quantized.dtype is torch.int8 and scale.shape == (50, 3) and scale[0, 0] == 0
    assert quantized.abs().amax() == 127
    error = (reference.dequantize(quantized, scale, torch.float32) - x).abs()
    assert (error <= scale[..., None] * 0.5001).all()
    assert torch.equal(reference.dequantize(quantized, scale, torch.float32)[0, 0], torch.zeros(33))


@pytest.mark.parametrize("window", [None, 4])
def test_attention_over_int8_is_attention_over_what_it_stands_for(window):
    """Scales of unused slots are NaN, so reading one is detected."""
    lengths, counts = [1, 5, 6, 37], [1, 5, 2, 9]
    k_cache, v_cache, tables, _ = paged(lengths, 5, 2, 8)
    (k, k_scale), (v, v_scale) = reference.quantize(k_cache), reference.quantize(v_cache)
    plain = [reference.dequantize(x, s, torch.float32) for x, s in ((k, k_scale), (v, v_scale))]
    q = torch.randn(sum(counts), 4, 8)
    lens, scales = torch.tensor(lengths), {"k_scale": k_scale, "v_scale": v_scale}
    out = reference.paged_decode(q[:4], k, v, tables, lens, 0.3, window, **scales)
    torch.testing.assert_close(out, reference.paged_decode(q[:4], *plain, tables, lens, 0.3, window))
    out = reference.paged_prefill(q, k, v, tables, lengths, counts, 0.3, window, **scales)
    torch.testing.assert_close(out, reference.paged_prefill(q, *plain, tables, lengths, counts, 0.3, window))
    weights = reference.attention_weights(q[0], k, tables[3], 37, 0.3, window, k_scale)
    torch.testing.assert_close(weights, reference.attention_weights(q[0], plain[0], tables[3], 37, 0.3, window))


def test_copies_and_swaps_take_the_scales_along():
    cache = Int8KVCache(2, 4, 3, 2, 8, torch.device("cpu"))
    space = SwapSpace(cache, 2)
    everything = [*cache.k, *cache.v, *cache.k_scale, *cache.v_scale]
    assert sum(t.nbytes for t in everything) == 4 * Int8KVCache.bytes_per_block(2, 3, 2, 8)
    torch.manual_seed(0)
    for tensor in everything:
        tensor.copy_(torch.randint(-100, 100, tensor.shape))
    before = [t.clone() for t in everything]
    cache.copy([(0, 1)])
    space.swap_out([(2, 1)])
    cache.copy([(0, 2)])
    space.swap_in([(1, 3)])
    for now, then in zip(everything, before, strict=True):
        assert torch.equal(now, then[[0, 0, 0, 2]])


def generate(params, prompts=PROMPTS, **settings):
    llm = LLM("tiny", device="cpu", kv_dtype="int8", block_size=5, **settings)
    kinds = set()
    llm.engine.events.subscribe(lambda event: kinds.add(event.type))
    outputs = llm.generate(prompts, params)
    llm.engine.check()
    return [[one.text for one in output.outputs] for output in outputs], kinds


def test_tokens_survive_swaps_recomputation_and_chunks():
    """A scale depends only on its own slot, so the other tokens of a batch do not matter."""
    params = SamplingParams(temperature=0, max_tokens=24)
    plain, _ = generate(params)
    swapped, kinds = generate(params, num_blocks=12, preemption="swap", max_num_batched_tokens=64)
    assert {"swapped_out", "swapped_in"} <= kinds and swapped == plain
    recomputed, kinds = generate(params, num_blocks=12, max_num_seqs=3, max_num_batched_tokens=7)
    assert "preempted" in kinds and recomputed == plain


def test_branches_that_copy_on_write_and_prefix_hits_give_the_tokens_of_single_runs():
    params = SamplingParams(n=3, temperature=1, seed=3, max_tokens=12)
    branches, kinds = generate(params, PROMPTS[:1])
    assert "copied" in kinds
    again, kinds = generate(params, PROMPTS[:1] * 2)  # the second request shares the cached blocks
    assert again == branches * 2
    llm = LLM("tiny", device="cpu", kv_dtype="int8", block_size=5)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    first, second = (llm.generate(PROMPTS[0], greedy)[0] for _ in range(2))
    assert second.outputs[0].text == first.outputs[0].text


def test_attention_can_be_looked_at():
    llm = LLM("tiny", device="cpu", kv_dtype="int8")
    llm.engine.add_request("r", llm.encode(PROMPTS[0]), SamplingParams(max_tokens=4))
    llm.engine.step()
    weights = attention(llm.engine, 0, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_logprobs_of_a_text_hardly_change():
    """A bound that a wrong scale would break. benchmarks/int8_accuracy.py measures the error on more tokens."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    text = "Once upon a time, there was a dragon who lived in a small town by the sea."
    found = {}
    for kv_dtype in ("auto", "int8"):
        llm = LLM("tiny", device="cpu", kv_dtype=kv_dtype)
        logprobs = llm.generate(text, params)[0].prompt_logprobs
        found[kv_dtype] = torch.tensor([next(iter(step.values())) for step in logprobs[1:]])
    difference = (found["int8"] - found["auto"]).abs()
    assert 0 < difference.max() < 0.1 and difference.mean() < 0.02
