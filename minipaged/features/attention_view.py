"""Shows attention weights while the engine runs: how much one token attends to each token before it.

The weights exist only for a moment inside a kernel. To show them, this file runs the token's forward pass once more,
without storing anything: the token's own keys and values are already in their slot, which may be shared by now. The
page's inspector shows the weights. Read `attention` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minipaged.core.engine import Engine
from minipaged.core.request import Sequence
from minipaged.errors import InvalidRequest
from minipaged.execution.batch import Batch
from minipaged.kernels import reference


class ObservedCache:
    """A read-only view of a KV cache that records the attention weights of one query in ``rows``."""

    def __init__(self, kv_cache: Any, block_table: Tensor, context_len: int) -> None:
        self._kv_cache, self._block_table, self._context_len = kv_cache, block_table, context_len
        self.rows: list[Tensor] = []  # one per layer: [H, context_len]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kv_cache, name)

    def store(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, rope: Any = None) -> Tensor:
        return q if rope is None else reference.rotate(q, *rope)

    def attend(self, q: Tensor, batch: Batch, layer: int, scale: float, sliding_window: int | None = None) -> Tensor:
        cache, k_scale = self._kv_cache.k[layer], self._kv_cache.k_scale[layer]
        weights = reference.attention_weights(
            q[0], cache, self._block_table, self._context_len, scale, sliding_window, k_scale
        )
        self.rows.append(weights.cpu())
        return self._kv_cache.attend(q, batch, layer, scale, sliding_window)


def attention(engine: Engine, seq_id: int, position: int) -> Tensor:
    """The attention weights of the token at ``position`` over tokens 0 … ``position`` of its sequence.

    Returns [layers, H, position + 1] on the CPU; each row sums to 1. Call it between two steps; it changes neither the
    engine's state nor its caches. Raises `InvalidRequest`, with the reason, if the token's KV is not in the pool.
    """
    seq = _running(engine, seq_id)
    if not 0 <= position < len(seq.tokens):
        raise InvalidRequest(f"sequence {seq_id} has {len(seq.tokens)} tokens; there is none at position {position}")
    if position >= seq.num_computed:
        raise InvalidRequest("this token has no key and value yet: it is computed in the next step")
    runner: Any = engine.runner
    if getattr(runner, "model", None) is None:
        raise InvalidRequest("this engine runs without a model, so it has no attention weights")
    if getattr(runner, "has_part_of_the_heads", False):
        raise InvalidRequest("other processes have the other heads, and compute only scheduled tokens; use one process")
    return _forward(runner, seq, position, engine.memory.tables[seq_id])


def _running(engine: Engine, seq_id: int) -> Sequence:
    """The sequence, if its blocks are in the pool. Raises `InvalidRequest` otherwise."""
    kept = [request for stage in engine.scheduler.stages for request in stage.requests()]
    if any(seq.seq_id == seq_id for request in kept for seq in request.live):
        raise InvalidRequest("this sequence is swapped out: its blocks are in CPU memory until it is swapped in")
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        for seq in request.live:
            if seq.seq_id == seq_id:
                if seq_id in engine.memory.tables:
                    return seq
                raise InvalidRequest("this sequence has no blocks yet, or it was preempted; try again when it runs")
    raise InvalidRequest("this sequence has ended, and its blocks were freed with its keys and values")


@torch.inference_mode()
def _forward(runner: Any, seq: Sequence, position: int, table: list[int]) -> Tensor:
    def tensor(data: list) -> Tensor:
        return torch.tensor(data, dtype=torch.int64, device=runner.device)

    block_table = tensor(table)
    size = runner.kv_cache.block_size
    batch = Batch(
        token_ids=tensor([seq.tokens[position]]),
        positions=tensor([position]),
        slot_mapping=tensor([table[position // size] * size + position % size]),
        block_tables=block_table[None],
        context_lens=tensor([position + 1]),
        logit_rows=tensor([0]),
        query_lens=[1],
        context_lens_list=[position + 1],
        num_decodes=1,
        prompt_lens=[seq.num_prompt],
    )
    observed = ObservedCache(runner.kv_cache, block_table, position + 1)
    runner.model(batch, observed)
    return torch.stack(observed.rows)
