"""The whole engine on the interpreted kernels: its greedy output equals that of plain torch."""

import pytest

from minipaged import LLM, SamplingParams

PROMPTS = ["Once upon a time, there was a dragon who", "One day", "Once upon a time, there was a fox who"]
SETTINGS = {"block_size": 5, "num_blocks": 24, "max_num_seqs": 3, "max_num_batched_tokens": 9, "dtype": "float32"}


@pytest.mark.parametrize("kv_dtype, prompts, max_tokens", [("auto", PROMPTS, 3), ("int8", PROMPTS[1:2], 2)])
def test_greedy_text_is_that_of_torch(kv_dtype, prompts, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    found = {}
    for attention in ("torch", "triton"):
        llm = LLM("tiny", device="cpu", attention=attention, kv_dtype=kv_dtype, **SETTINGS)
        assert llm.engine.runner.kv_cache.kernels.name == attention
        found[attention] = [out.outputs[0].text for out in llm.generate(prompts, params)]
    assert found["triton"] == found["torch"] and all(found["torch"])


def test_copy_on_write_and_swapping_on_the_kernels():
    """Three beams in a pool too small for two requests cause forks, copies, and swaps in both directions."""
    params = SamplingParams(temperature=0, beam_width=3, max_tokens=4)
    settings = SETTINGS | {"num_blocks": 7, "preemption": "swap", "max_num_seqs": 6, "enable_prefix_caching": False}
    found, kinds = {}, set()
    for attention in ("torch", "triton"):
        llm = LLM("tiny", device="cpu", attention=attention, **settings)
        llm.engine.events.subscribe(lambda event: kinds.add(event.type))
        found[attention] = [out.outputs[0].text for out in llm.generate(PROMPTS[:2], params)]
    assert found["triton"] == found["torch"]
    assert {"copied", "swapped_out", "swapped_in"} <= kinds
