"""Layers that the models share: norm, rotary positions, attention over KV blocks; and reading ``config.json``.

Letters used in shapes, in addition to those of ``kernels/reference.py`` (T tokens, H heads, KH key/value heads,
D head dimension):

    C  hidden size (width of the residual stream)     F  width inside the MLP
    R  rows that need logits                          V  vocabulary size
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipaged.errors import ModelError  # typed errors
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.kernels import reference


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


@dataclass(frozen=True)
class Rope:
    """Parameters of rotary positions (RoFormer): how fast each channel pair rotates, and its scaling for long contexts.

    ``linear`` slows every pair down by ``factor``. ``llama3`` slows only the pairs that turn less than
    ``low_freq_factor`` times within ``original_max_len`` tokens, does not change those that turn more than
    ``high_freq_factor`` times, and interpolates between them.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rope:
        """Reads ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (older versions).

        Raises ModelError for an unsupported kind of scaling.
        """
        params = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(params, dict) or any(isinstance(value, dict) for value in params.values()):
            raise ModelError("config.json: rope_parameters must be one flat object, the same for all layers")
        kind = params.get("rope_type") or params.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise ModelError(f"config.json: rope type {kind!r} is not supported; default, linear, llama3 are")
        require_plain(config | params, partial_rotary_factor=1.0)
        theta = need(config | params, "rope_theta", float, default=10_000.0)
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, need(params, "factor", float))
        return cls(
            theta,
            kind,
            need(params, "factor", float),
            need(params, "low_freq_factor", float),
            need(params, "high_freq_factor", float),
            need(config | params, "original_max_position_embeddings", int),
        )

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per token of each pair of channels: [D/2] float32, on the CPU."""
        pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        freq = 1.0 / self.theta ** (pair / head_dim)
        if self.kind == "linear":
            return freq / self.factor
        if self.kind == "llama3":
            turns = self.original_max_len * freq / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = keep.clamp(0, 1)  # 0: slowed down by the factor; 1: unchanged
            return keep * freq + (1 - keep) * freq / self.factor
        return freq


class RotaryEmbedding(nn.Module):
    """Positions → the cosines and sines by which `reference.rotate` rotates queries and keys, once for all layers."""

    frequencies: Tensor

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        # float32 for any dtype of the weights: at position 10,000 bfloat16 can be wrong by tens of radians.
        self.register_buffer("frequencies", rope.frequencies(head_dim), persistent=False)  # [D/2]

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [T]. Returns cos and sin, each [T, 1, D]: the 1 broadcasts over the heads."""
        angles = positions.float()[:, None] * self.frequencies  # [T, D/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [T, 1, D]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def need(config: dict[str, Any], key: str, kind: type[int] | type[float] = int, default: float | None = None) -> Any:
    """Reads a positive number from ``config.json``. Raises ModelError if it is not one, or missing without default."""
    value = default if config.get(key) is None else config[key]
    allowed = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
        raise ModelError(f"config.json: {key} must be a positive number, but is {value!r}")
    return value


def require_plain(config: dict[str, Any], **plain: Any) -> None:
    """Rejects options that would change results. ``plain``: option → its default, the only supported value.

    A silently ignored option gives wrong results that look right. Raises ModelError with the option's name.
    """
    for key, value in plain.items():
        given = config.get(key)
        if given is not None and given != value:
            raise ModelError(f"config.json: {key} = {given!r} is not supported, only {value!r}")
