"""The runner's side of swapping: copies blocks between the KV cache and CPU memory."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from minipaged.core.plan import StepPlan
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.lazy_memory import zeros
from minipaged.execution.runner import WrappedRunner


class SwapSpace:
    """``num_blocks`` blocks on the CPU, of the same layout as those of ``kv_cache``."""

    def __init__(self, kv_cache: KVCache, num_blocks: int) -> None:
        self.kv_cache = kv_cache
        # The GPU copies pinned memory by itself, so the host need not wait. Pinned memory is committed at once.
        pinned = kv_cache.k[0].device.type == "cuda"

        def empty(like: Tensor) -> Tensor:
            shape = (num_blocks, *like.shape[1:])
            if pinned:
                return torch.zeros(shape, dtype=like.dtype, pin_memory=True)
            return zeros(shape, like.dtype, torch.device("cpu"))

        self.stores = [[empty(tensor) for tensor in store] for store in kv_cache.stores]

    def swap_out(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies blocks (source in the pool, target in the swap space) in all layers."""
        self._transfer(pairs, self.kv_cache.stores, self.stores)

    def swap_in(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies blocks (source in the swap space, target in the pool) in all layers."""
        self._transfer(pairs, self.stores, self.kv_cache.stores)

    def _transfer(self, pairs: Seq[tuple[int, int]], sources: list[list[Tensor]], targets: list[list[Tensor]]) -> None:
        if pairs:
            src, dst = torch.tensor(pairs).unbind(dim=1)
            for source, target in zip(sources, targets, strict=True):
                self.kv_cache.kernels.swap_blocks(source, target, src, dst)


class SwapRunner(WrappedRunner):
    """Swaps out, then in, then executes the rest of the plan: in this order one step can reuse a block."""

    def __init__(self, inner: Any, num_blocks: int) -> None:
        super().__init__(inner)
        self.space = SwapSpace(inner.kv_cache, num_blocks)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Any:
        self.space.swap_out(plan.swap_outs)
        self.space.swap_in(plan.swap_ins)
        return self.inner.execute(plan)
