"""Runs a plan with a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minipaged.execution.batch import build_batch
from minipaged.execution.cuda_graphs import DecodeGraphs
from minipaged.execution.kv_cache import KVCache
from minipaged.scheduling.plan import StepPlan


class ModelRunner:
    """Owns the model and its KV cache; turns plans into logits. ``graphs`` run the steps that they cover."""

    def __init__(
        self, model: Any, kv_cache: KVCache, device: torch.device, graphs: DecodeGraphs | None = None
    ) -> None:
        self.model, self.kv_cache, self.device, self.graphs = model, kv_cache, device, graphs

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor:
        """Map, swap-out, swap-in, copy, forward: in this order a block may serve twice in one step.

        Returns logits [R, vocab], ``num_rows`` rows for each chunk; no row if there is no chunk.
        """
        if plan.maps is not None:
            self.kv_cache.remap(plan.maps)
        self.kv_cache.swap_out(plan.swap_outs)
        self.kv_cache.swap_in(plan.swap_ins)
        self.kv_cache.copy(plan.copies)
        if not plan.chunks:
            return torch.empty(0, device=self.device)
        batch = build_batch(plan, self.kv_cache.block_size, self.device)
        # BatchLLM lets more sequences run than there are graphs for.
        if self.graphs is not None and self.graphs.covers(batch) and len(batch.query_lens) <= self.graphs.sizes[-1]:
            return self.graphs.run(batch)
        return self.model(batch, self.kv_cache)
