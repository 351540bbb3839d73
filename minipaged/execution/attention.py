"""Looking at attention while the engine runs: what one token of a sequence makes of the blocks before it.

The weights exist only for the moment inside a kernel. To show them, the token's forward pass is run once more,
without storing anything: its own keys and values lie in their slot already, and may be shared by now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minipaged.errors import InvalidRequest
from minipaged.execution.batch import Batch
from minipaged.execution.tensor_parallel import LeadingRunner
from minipaged.kernels import reference

if TYPE_CHECKING:
    from minipaged.engine import Engine
    from minipaged.request import Sequence


def attention(engine: Engine, seq_id: int, position: int) -> Tensor:
    """The attention weights of the token at ``position`` over tokens 0 … ``position`` of its sequence.

    Returns [layers, H, position + 1] on the CPU; each row sums to 1. To be called between two steps; changes neither
    the engine's state nor its caches. Raises `InvalidRequest`, saying why, where the KV is not in the pool.
    """
    seq = _running(engine, seq_id)
    if not 0 <= position < len(seq.tokens):
        raise InvalidRequest(f"sequence {seq_id} has {len(seq.tokens)} tokens; there is none at position {position}")
    if position >= seq.num_computed:
        raise InvalidRequest("this token has no key and value yet: it is computed in the next step")
    runner: Any = engine.runner
    if not hasattr(runner, "model"):
        raise InvalidRequest("this engine runs without a model to look into")
    if isinstance(runner, LeadingRunner):
        raise InvalidRequest("other processes have the other heads, and compute only what is planned; look on in one")
    return _forward(runner, seq.tokens[position], position, engine.memory.tables[seq_id])


def _running(engine: Engine, seq_id: int) -> Sequence:
    """The sequence, if its blocks are in the pool."""
    if seq_id in engine.memory.swapped:
        raise InvalidRequest("this sequence is swapped out: its blocks are on the CPU until it comes back")
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        for seq in request.live:
            if seq.seq_id == seq_id:
                if seq_id in engine.memory.tables:
                    return seq
                raise InvalidRequest("this sequence has no blocks yet, or gave them back; look again when it writes")
    raise InvalidRequest("this sequence has no blocks any more: it has ended, and its keys and values with it")


@torch.inference_mode()
def _forward(runner: Any, token_id: int, position: int, table: list[int]) -> Tensor:
    rows: list[Tensor] = []

    def observe(layer: int, q: Tensor, k_cache: Tensor, scale: float, sliding_window: int | None) -> None:
        k_scale = runner.kv_cache.k_scale[layer]
        weights = reference.attention_weights(q[0], k_cache, block_table, position + 1, scale, sliding_window, k_scale)
        rows.append(weights.cpu())

    def tensor(data: list) -> Tensor:
        return torch.tensor(data, dtype=torch.int64, device=runner.device)

    block_table = tensor(table)
    size = runner.kv_cache.block_size
    batch = Batch(
        token_ids=tensor([token_id]),
        positions=tensor([position]),
        slot_mapping=tensor([table[position // size] * size + position % size]),
        block_tables=block_table[None],
        context_lens=tensor([position + 1]),
        logit_rows=tensor([0]),
        query_lens=[1],
        context_lens_list=[position + 1],
        num_decodes=1,
        observe=observe,
        read_only=True,
    )
    runner.model(batch, runner.kv_cache)
    return torch.stack(rows)
