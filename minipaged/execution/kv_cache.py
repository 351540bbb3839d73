"""The KV cache: the tensors that hold all keys and values."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from minipaged.execution.batch import Batch
from minipaged.execution.lazy_memory import zeros  # on a CPU, memory that is committed as it is written
from minipaged.kernels.backend import TORCH, Kernels  # functions of kernels/reference.py, or faster ones


class KVCache:
    """Keys and values of all layers, in KV blocks.

    ``k[layer]`` and ``v[layer]`` are [num_blocks, block_size, kv_heads, head_dim]. ``k_scale`` and ``v_scale`` are for
    quantized caches (`features.kv_int8`); here they are ``None``. ``kernels``: functions that read and write the cache,
    and one for the model (``add_norm``): plain torch (kernels/reference.py), or what `kernels.backend` chose for the
    device, on a GPU kernels/paged_decode.py and others.
    This class is only storage; `core.block_table` records which block belongs to which sequence.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels = TORCH,
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k = [zeros(shape, dtype, device) for _ in range(num_layers)]
        self.v = [zeros(shape, dtype, device) for _ in range(num_layers)]
        self.k_scale: Seq[Tensor | None] = [None] * num_layers
        self.v_scale: Seq[Tensor | None] = [None] * num_layers
        self.stores = [self.k + self.v]  # lists of tensors of one shape: all data of a block, for copies and swaps
        self.num_blocks, self.block_size, self.kernels = num_blocks, block_size, kernels

    @staticmethod
    def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes per block: 2 (key and value) · layers · block size · heads · head dimension · bytes per number."""
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize

    def store(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Writes this step's keys and values to their slots; first rotates queries and keys by ``rope``, if given.

        q: [T, H, D]; k, v: [T, KH, D] (KV heads); rope: cosines and sines, [T, 1, D] each. Returns the queries.
        """
        caches = (self.k[layer], self.v[layer], batch.slot_mapping, self.k_scale[layer], self.v_scale[layer])
        if rope is not None:
            cos, sin = rope
            return self.kernels.rope_store(q, k, v, cos, sin, *caches)
        self.kernels.store_kv(k, v, *caches)
        return q

    def attend(self, q: Tensor, batch: Batch, layer: int, scale: float, sliding_window: int | None = None) -> Tensor:
        """Every token attends to the blocks of its own sequence, itself included. q: [T, H, D] → [T, H, D]."""
        caches, scales = (self.k[layer], self.v[layer]), (self.k_scale[layer], self.v_scale[layer])
        n, tables = batch.num_decodes, batch.block_tables
        outs = []
        if n:  # decodes: one query per sequence, all in one call
            lens = batch.context_lens[:n]
            outs.append(self.kernels.paged_decode(q[:n], *caches, tables[:n], lens, scale, sliding_window, *scales))
        if n < len(batch.query_lens):  # prefill chunks
            lists = batch.context_lens_list[n:], batch.query_lens[n:]
            outs.append(self.kernels.paged_prefill(q[n:], *caches, tables[n:], *lists, scale, sliding_window, *scales))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies blocks (source, target) in all layers; all sources are read before any target is written."""
        if pairs:
            src, dst = torch.tensor(pairs).unbind(dim=1)
            for caches in self.stores:
                self.kernels.copy_blocks(caches, src, dst)
