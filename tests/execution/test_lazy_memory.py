"""The pool's memory: zeros that the system commits as they are written."""

from __future__ import annotations

import gc
import sys
from mmap import PAGESIZE

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.build import kv_tensors
from minipaged.errors import InvalidConfig
from minipaged.execution.lazy_memory import committed, zeros

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell resident pages in their own ways")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_they_are_zeros_like_torchs(dtype):
    ours = zeros((3, 5, 7), dtype, CPU)
    assert torch.equal(ours, torch.zeros(3, 5, 7, dtype=dtype)) and ours.is_contiguous()
    assert zeros((0, 5), dtype, CPU).shape == (0, 5)
    ours[1] = 1
    assert ours.sum() == 35


def test_a_refusal_of_the_system_says_what_to_do(monkeypatch):
    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(InvalidConfig, match="the system refuses 64 bytes for KV .*smaller kv_memory"):
        zeros((16,), torch.float32, CPU)


@linux
def test_memory_is_committed_page_by_page():
    gib = zeros((1 << 18, 1 << 10), torch.float32, CPU)
    assert committed([gib]) == 0
    gib[1000:1010] = 1  # 40 KiB
    assert 40 << 10 <= committed([gib, gib[5:]]) <= (40 << 10) + 2 * PAGESIZE, "views are counted once"


@linux
def test_a_view_keeps_the_memory_and_the_last_one_gives_it_back():
    import psutil

    view = zeros((64 << 20,), torch.int8, CPU)[7:]
    before = psutil.Process().memory_info().rss
    view.fill_(1)
    gc.collect()
    assert committed([view]) == 64 << 20
    assert view.sum(dtype=torch.int64) == view.numel()
    del view
    assert psutil.Process().memory_info().rss - before < 16 << 20


@linux
@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int8"}, {"preemption": "swap"}, {"speculate": "tiny"}], ids=str)
def test_an_engine_takes_what_it_uses(settings):
    llm = LLM("tiny", kv_memory="256MiB", device="cpu", **settings)
    tensors = kv_tensors(llm.engine)
    whole = sum(tensor.nbytes for tensor in tensors)
    assert whole == llm.engine.num_blocks * llm.engine.bytes_per_block * (2 if "preemption" in settings else 1)
    assert committed(tensors) == 0
    llm.generate("Once upon a time", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    used = -(-24 // llm.engine.config.block_size) * llm.engine.bytes_per_block
    assert 0 < committed(tensors) <= used + len(tensors) * 4 * PAGESIZE, "in each tensor at most a few pages more"


def test_a_swapped_block_comes_back_from_lazy_memory():
    prompts = [[number, 5, 6, 7] for number in range(8, 12)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    settings = {"block_size": 4, "device": "cpu", "max_num_seqs": 4}
    plenty, tight = (
        LLM("tiny", num_blocks=blocks, preemption="swap", **settings).generate(prompts, params) for blocks in (64, 16)
    )
    assert [one.outputs[0].token_ids for one in plenty] == [one.outputs[0].token_ids for one in tight]
