"""Layers that the models share: norm, rotary positions, attention over KV blocks.

Letters used in shapes, in addition to those of ``kernels/reference.py`` (T tokens, H heads, KH key/value heads,
D head dimension):

    C  hidden size (width of the residual stream)     F  width inside the MLP
    R  rows that need logits                          V  vocabulary size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.kernels import reference
from minipaged.models.rope import Rope  # the parameters of rotary positions, and their scaling for long contexts


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    kv_cache: KVCache,
    layer: int,
    scale: float,
    sliding_window: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Stores this step's keys and values; then every token attends to the blocks of its own sequence.

    q: [T, H, D]; k, v: [T, KH, D]. Returns [T, H, D]. ``sliding_window``: a token sees itself and the
    ``sliding_window - 1`` tokens before it; ``None`` means all of them. ``rope``: cosines and sines, [T, 1, D] each,
    by which queries and keys are rotated first.
    """
    # Store first: then a token finds itself, its chunk and earlier tokens in the cache, without special cases.
    q = kv_cache.store(q, k, v, batch, layer, rope)
    return kv_cache.attend(q, batch, layer, scale, sliding_window)


def embedding(rows: int, size: int) -> nn.Embedding:
    """An uninitialized embedding table [rows, size]: for random weights nn.Embedding imports modules for a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size))


class RMSNorm(nn.Module):
    """RMSNorm: scales vectors to a root mean square of 1, then channels by a learned weight. [..., C] → [..., C]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Positions → the cosines and sines by which `reference.rotate` rotates queries and keys, once for all layers."""

    frequencies: Tensor

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        self.rope = rope
        # Radians per token of each pair of channels, 1 / theta^(2i / D) without scaling.
        # float32 for any dtype of the weights: at position 10,000 bfloat16 can be wrong by tens of radians.
        self.register_buffer("frequencies", rope.frequencies(head_dim), persistent=False)  # [D/2]

    def forward(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of the batch's T tokens, each [T, 1, D]: the 1 broadcasts over the heads."""
        # Dynamic RoPE adapts the frequencies to each sequence's length.
        angles = batch.positions.float()[:, None] * self.rope.adapted(self.frequencies, batch)  # [T, D/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [T, 1, D]
        cos, sin, scale = angles.cos(), angles.sin(), self.rope.attention_factor
        if scale != 1:  # yarn
            cos, sin = cos * scale, sin * scale
        return cos.to(dtype), sin.to(dtype)
