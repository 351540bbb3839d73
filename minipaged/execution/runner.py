"""The model runner: executes a step's plan with a model and its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipaged.core.plan import StepPlan
from minipaged.core.seams import Runner
from minipaged.execution.batch import Batch, build_batch
from minipaged.execution.kv_cache import KVCache

Forward = Callable[[Batch, KVCache], Tensor]


class ModelRunner:
    """Owns the model and its KV cache; computes a plan's logits.

    ``forward`` may compute a step in place of the model, on the same weights: `features.cpu_step` does it in C++,
    `features.cuda_graphs` by replaying recorded kernels.
    """

    def __init__(self, model: Any, kv_cache: KVCache, device: torch.device, forward: Forward | None = None) -> None:
        self.model, self.kv_cache, self.device = model, kv_cache, device
        self.forward: Forward = model if forward is None else forward

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor:
        """Copies blocks, then computes the chunks, which may write to a copied block in the same step.

        Returns logits [R, vocab], ``num_rows`` rows for each chunk; no rows if there is no chunk.
        """
        self.kv_cache.copy(plan.copies)
        if not plan.chunks:
            return torch.empty(0, device=self.device)
        return self.forward(build_batch(plan, self.kv_cache.block_size, self.device), self.kv_cache)


class WrappedRunner:
    """Base class of the features' runners: each executes its part of a plan, then calls ``inner`` for the rest."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def execute(self, plan: StepPlan) -> Any:
        return self.inner.execute(plan)

    def __getattr__(self, name: str) -> Any:
        """Forwards ``model``, ``kv_cache``, ``device`` and ``forward`` to the inner runner."""
        return getattr(object.__getattribute__(self, "inner"), name)  # self.inner would recurse before it is set


__all__ = ["Forward", "ModelRunner", "Runner", "WrappedRunner"]
