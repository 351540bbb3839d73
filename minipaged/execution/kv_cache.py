"""The KV tensors: where every key and value lives."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from minipaged.errors import InvalidConfig
from minipaged.kernels.backend import TORCH, Kernels
from minipaged.memory.managers.virtual import PageMaps


class KVCache:
    """Keys and values of all layers, in blocks.

    ``k[layer]`` and ``v[layer]`` are [num_blocks, block_size, kv_heads, head_dim]. With ``dtype`` int8 they are
    quantized, and ``k_scale[layer]`` and ``v_scale[layer]``, [num_blocks, block_size, kv_heads] in float32, go with
    them wherever a block goes; else these are ``None``. The swap space on the CPU has the same layout with
    ``swap_blocks`` blocks. ``kernels`` are what reads and writes the cache. Which block belongs to whom is the business
    of ``minipaged.memory``; here is only storage.

    Where memory can be mapped (`VirtualKVCache`), ``k_slots[layer]`` and ``v_slots[layer]`` show it in sequence order.
    """

    k_slots: list[torch.Tensor]
    v_slots: list[torch.Tensor]

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        swap_blocks: int = 0,
        kernels: Kernels = TORCH,
    ) -> None:
        shape = (block_size, num_kv_heads, head_dim)

        def tensors(*shape: int, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [torch.zeros(num_blocks, *shape, dtype=dtype, device=device) for _ in range(num_layers)]

        self.k, self.v = tensors(*shape), tensors(*shape)
        self.k_scale: Seq[Tensor | None] = [None] * num_layers
        self.v_scale: Seq[Tensor | None] = [None] * num_layers
        self._stores = [self.k + self.v]  # lists of tensors of one shape, which are copied and swapped alike
        if dtype is torch.int8:
            k_scale, v_scale = (tensors(*shape[:2], dtype=torch.float32) for _ in range(2))
            self.k_scale, self.v_scale = k_scale, v_scale
            self._stores.append(k_scale + v_scale)
        pinned = device.type == "cuda"  # the GPU reaches pinned memory by itself, and nobody waits
        self._swap = [
            [torch.zeros(swap_blocks, *t.shape[1:], dtype=t.dtype, pin_memory=pinned) for t in store]
            for store in self._stores
        ]
        self.num_blocks, self.block_size, self.kernels = num_blocks, block_size, kernels

    @staticmethod
    def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """2 (key and value) · layers · block size · heads · (head dimension · bytes of a number + bytes of a scale)."""
        scale = 4 if dtype is torch.int8 else 0
        return 2 * num_layers * block_size * num_kv_heads * (head_dim * dtype.itemsize + scale)

    def remap(self, maps: PageMaps) -> None:
        """Only virtual memory can be mapped."""
        raise NotImplementedError

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies blocks (source, target) in all layers; reads before writes."""
        if pairs:
            src, dst = torch.tensor(pairs).unbind(dim=1)
            for caches in self._stores:
                self.kernels.copy_blocks(caches, src, dst)

    def swap_out(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies blocks (source in the pool, target in the swap space) in all layers."""
        self._transfer(pairs, self._stores, self._swap)

    def swap_in(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copies blocks (source in the swap space, target in the pool) in all layers."""
        self._transfer(pairs, self._swap, self._stores)

    def _transfer(self, pairs: Seq[tuple[int, int]], sources: list[list[Tensor]], targets: list[list[Tensor]]) -> None:
        if pairs:
            src, dst = torch.tensor(pairs).unbind(dim=1)
            for source, target in zip(sources, targets, strict=True):
                self.kernels.swap_blocks(source, target, src, dst)


def blocks_that_fit(
    bytes_per_block: int, device: torch.device, *, wanted: int | None, useful: int, swap_blocks: int | None = 0
) -> int:
    """How many blocks the pool gets.

    ``wanted`` if given, unless the memory there is cannot hold it (`InvalidConfig`). Else as many as fit into half of
    a CPU's free memory (others need some too) or nine tenths of a GPU's, but no more than ``useful``: what the running
    batch could ever fill. A CPU's memory also has to hold the ``swap_blocks``; ``None``: as many as the pool's.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier engine had counts as taken until then
        free, share = torch.cuda.mem_get_info(device)[0], 0.9
    else:
        import psutil  # only here: an engine on a GPU does without it

        free, share = psutil.virtual_memory().available, 0.5

    def most(space: int) -> int:
        blocks = space // bytes_per_block
        if device.type == "cuda":
            return blocks  # swaps to the memory of another device
        return blocks // 2 if swap_blocks is None else max(0, blocks - swap_blocks)

    if wanted is None:
        wanted = min(useful, most(int(free * share)))
        if wanted == 0:
            raise InvalidConfig(
                f"not even one KV block of {bytes_per_block} bytes fits into the memory of {device}, "
                f"swap space included"
            )
    elif wanted > most(free):
        raise InvalidConfig(
            f"num_blocks = {wanted} takes {wanted * bytes_per_block / 1e9:.1f} GB of KV cache, but {device} has "
            f"{free / 1e9:.1f} GB free: {most(free)} blocks at most, swap space included"
        )
    return wanted
