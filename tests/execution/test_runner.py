"""The order of swap-outs, swap-ins and copies within a step, on real tensors."""

import torch

from minipaged.core.plan import Copy, StepPlan
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.runner import ModelRunner
from minipaged.features.swap.swap_runner import SwapRunner


def fill(cache, numbers):
    for layer in range(2):
        for block, number in enumerate(numbers):
            cache.k[layer][block], cache.v[layer][block] = number + layer, -number - layer


def test_a_block_may_be_swapped_out_swapped_in_and_copied_in_one_step():
    cache = KVCache(2, 3, 4, 1, 2, torch.float32, torch.device("cpu"))
    runner = SwapRunner(ModelRunner(None, cache, torch.device("cpu")), 3)
    fill(cache, [10, 20, 30])
    runner.execute(StepPlan(0, swap_outs=[Copy(0, 1)]))  # 10 lies in block 1 of the swap space
    fill(cache, [40, 50, 60])
    # Block 1 is swapped out and overwritten by a swap-in, whose content is copied to block 2, also swapped out before.
    outs = [Copy(1, 0), Copy(2, 2)]
    runner.execute(StepPlan(1, swap_outs=outs, swap_ins=[Copy(1, 1)], copies=[Copy(1, 2)]))
    for layer in range(2):
        for tensor, sign in ((cache.k[layer], 1), (cache.v[layer], -1)):
            assert [sign * block.unique().item() for block in tensor] == [40 + layer, 10 + layer, 10 + layer]
    runner.execute(StepPlan(2, swap_ins=[Copy(0, 1), Copy(2, 2)]))
    assert [block.unique().item() for block in cache.k[1]] == [41, 51, 61]  # as before the swap-out


def test_a_step_without_chunks_has_no_logits():
    cache = KVCache(1, 1, 4, 1, 2, torch.float32, torch.device("cpu"))
    assert len(ModelRunner(None, cache, torch.device("cpu")).execute(StepPlan(0))) == 0
