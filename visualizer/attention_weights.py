"""Attention weights of one token over its sequence's KV blocks, encoded for the page's inspector."""

from __future__ import annotations

import base64
from typing import Any

from minipaged.core.engine import Engine

MAX_NUMBERS = 500_000  # weights (2 MB); above that the page receives only each layer's mean over its heads


def look(engine: Engine, seq_id: int, position: int) -> dict[str, Any]:
    """The attention weights of the token at ``position``, and the physical KV blocks that they refer to.

    The weights are base64 of float32, [layers, heads (1 if averaged), position + 1]. Call it in the engine's thread.
    Raises `InvalidRequest` if they cannot be computed, for example because the sequence is swapped out.
    """
    from minipaged.features.attention_view import attention  # imports torch, which a replay does not need

    weights = attention(engine, seq_id, position)
    averaged = weights.numel() > MAX_NUMBERS
    if averaged:
        weights = weights.mean(dim=1, keepdim=True)
    layers, heads, _ = weights.shape
    table = engine.memory.tables[seq_id]
    return {
        "seq_id": seq_id,
        "position": position,
        "layers": layers,
        "heads": heads,
        "averaged": averaged,
        "blocks": table[: position // engine.memory.block_size + 1],
        "step": engine.scheduler.step,
        "weights": base64.b64encode(weights.contiguous().numpy().tobytes()).decode(),
    }
