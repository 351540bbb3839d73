"""The answer to "what did this token look at?", as the page takes it."""

from __future__ import annotations

import base64
from typing import Any

from minipaged.core.engine import Engine

MAX_NUMBERS = 500_000  # beyond that (2 MB) the page gets each layer's mean over its heads only


def look(engine: Engine, seq_id: int, position: int) -> dict[str, Any]:
    """The weights as base64 of float32, [layers, heads, position + 1], and the blocks they lie in.

    To be called in the engine's thread. Raises `InvalidRequest` where there is nothing to see.
    """
    from minipaged.features.attention_view import attention  # brings torch, which a replay does without

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
