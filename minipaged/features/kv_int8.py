"""An int8 KV cache: it holds almost twice as many tokens as a 16-bit cache in the same memory.

Adds ``kv_dtype="int8"``. It is a `KVCache` with a float32 scale for each slot and head; the kernels apply the scales.
Read `kernels.reference.quantize` first: it explains why each slot has its own scale. Results change a little:
``benchmarks/int8_accuracy.py`` measures how much. The page does not show it: an int8 block looks like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minipaged.execution.kv_cache import KVCache
from minipaged.execution.lazy_memory import zeros
from minipaged.kernels.backend import TORCH, Kernels

KV_DTYPES = ("auto", "int8")


class Int8KVCache(KVCache):
    """``k[layer]`` and ``v[layer]`` are int8, ``k_scale[layer]`` and ``v_scale[layer]``
    [num_blocks, block_size, kv_heads] float32; number ≈ int8 · scale."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        kernels: Kernels = TORCH,
    ) -> None:
        super().__init__(num_layers, num_blocks, block_size, num_kv_heads, head_dim, torch.int8, device, kernels)

        def scales() -> list[Tensor]:
            shape = (num_blocks, block_size, num_kv_heads)
            return [zeros(shape, torch.float32, device) for _ in range(num_layers)]

        k_scale, v_scale = scales(), scales()
        self.k_scale, self.v_scale = k_scale, v_scale
        self.stores.append(k_scale + v_scale)

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: Any = torch.int8
    ) -> int:
        """2 (key and value) · layers · block size · heads · (head dimension + 4 bytes of a scale)."""
        return 2 * num_layers * block_size * num_kv_heads * (head_dim + 4)
