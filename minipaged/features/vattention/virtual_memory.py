"""vAttention's memory: a sequence's keys and values are contiguous in *virtual* memory (Prabhu et al., ASPLOS 2025).

Far more address space is reserved than there is memory: for each of ``max_num_seqs`` *slots*, in every layer, a range
that could hold the longest sequence. Physical memory is a pool of *page-groups*, the blocks of the paged manager. One
is mapped into a slot when the slot's sequence grows into it; so attention can treat the slot as one contiguous tensor,
and needs no block table. `virtual_tables` decides which page-group is mapped where; this file maps it.

A page-group has several addresses: in the *pool*, in the order of page-group numbers (there tokens are stored, and
blocks copied and swapped), and in every slot that it is mapped into (there attention reads).
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipaged.core.plan import StepPlan
from minipaged.errors import InvalidConfig
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.runner import WrappedRunner
from minipaged.features.vattention import slot_attention
from minipaged.features.vattention.page_memory import HostMemory, PageMemory
from minipaged.features.vattention.virtual_tables import PageMap, PageMaps

USUAL_BLOCK_SIZE = 16  # tokens; a page-group is the smallest multiple of a page that holds this many


@dataclass(frozen=True)
class Layout:
    """The layout of virtual tensors: two for each layer (keys, values), or with ``tensor_slicing`` two for all layers.

    With ``tensor_slicing`` a layer is a slice of each tensor (vAttention §5.3.4). A page-group then holds the tokens of
    all layers, so fewer of them: finer granularity for the same page size.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    tensor_slicing: bool = False

    @property
    def layers_per_tensor(self) -> int:
        return self.num_layers if self.tensor_slicing else 1

    @property
    def num_tensors(self) -> int:
        return 2 * self.num_layers // self.layers_per_tensor

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one tensor."""
        return self.layers_per_tensor * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def block_size(self, wanted: int | None, max_num_seqs: int, max_model_len: int, device: torch.device) -> int:
        """Tokens per page-group: ``wanted``, or for ``None`` the smallest number that works and is at least 16.

        Raises `InvalidConfig`, with the numbers that work, if page-groups of ``wanted`` tokens do not fill whole pages,
        or if they are so small that the system does not allow enough mappings.
        """
        page, limit = page_size(device), _most_mappings(device)
        unit = page // math.gcd(page, self.token_bytes)
        ranges = self.num_tensors * max_num_seqs  # each of ceil(max_model_len / block_size) page-groups
        if ranges > limit:
            raise InvalidConfig(
                f"{max_num_seqs} slots in {self.num_tensors} tensors need more memory mappings than the {limit} that "
                "this system allows a process (vm.max_map_count): set a lower max_num_seqs, or tensor_slicing=True"
            )
        least = -(-max_model_len // (limit // ranges))
        size = wanted or -(-max(least, USUAL_BLOCK_SIZE) // unit) * unit
        if size % unit:
            raise InvalidConfig(
                f"block_size = {size} does not fill whole pages of {page} bytes, because a token takes "
                f'{self.token_bytes} bytes: with memory="vattention" it must be a multiple of {unit} here '
                f"({unit}, {2 * unit}, {3 * unit}, …), or left out"
            )
        if size < least:
            raise InvalidConfig(
                f"page-groups of {size} tokens may need {ranges * -(-max_model_len // size)} memory mappings, but this "
                f"system allows {limit} (vm.max_map_count): set a block_size of {-(-least // unit) * unit} or more, "
                "tensor_slicing=True, or a lower max_num_seqs or max_model_len"
            )
        return size


def page_size(device: torch.device) -> int:
    """Bytes of the smallest unit that can be mapped. Raises `InvalidConfig` where nothing can."""
    if device.type == "cuda":
        from minipaged.features.vattention.cuda_memory import granularity

        return granularity(device)
    if device.type != "cpu" or sys.platform != "linux":
        raise InvalidConfig(
            f'memory="vattention" maps memory by hand, which works on Linux (CPU) and CUDA, not with {device.type} on '
            f'{sys.platform}; use memory="paged"'
        )
    return mmap.PAGESIZE


def _most_mappings(device: torch.device) -> int:
    """Number of mappings that this process may make, minus a tenth for all other code in it."""
    if device.type == "cuda":
        return sys.maxsize
    return int(Path("/proc/sys/vm/max_map_count").read_text()) // 10 * 9


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of reserved address space, of physical memory in the pool, and of address space that is mapped now.

    A page-group that two slots share counts twice in ``mapped``, which may therefore exceed ``physical``.
    """

    reserved: int
    physical: int
    mapped: int


class VirtualKVCache(KVCache):
    """A KV cache whose blocks also appear, in order, in the slots of the sequences that own them.

    Beside ``k[layer]`` and ``v[layer]`` [num_blocks, block_size, kv_heads, head_dim], the pool, there are
    ``k_slots[layer]`` and ``v_slots[layer]`` [max_num_seqs, max_model_len (rounded up to blocks), kv_heads, head_dim],
    where attention reads.
    Only what `remap` has mapped may be accessed in a slot. Raises `InvalidConfig` as `Layout.block_size` does.
    """

    def __init__(
        self,
        layout: Layout,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        heads = (layout.num_kv_heads, layout.head_dim)
        super().__init__(layout.num_layers, 0, block_size, *heads, layout.dtype, device)
        block_size = layout.block_size(block_size, max_num_seqs, max_model_len, device)
        self.num_blocks, self._slots, self._width = num_blocks, max_num_seqs, -(-max_model_len // block_size)
        tensors = layout.num_tensors
        sizes = (block_size * layout.token_bytes, tensors * num_blocks, tensors * max_num_seqs * self._width)
        self.memory = _page_memory(device, *sizes)
        self._tensors = range(tensors)
        # [tensors, blocks or slots, tokens, layers in a tensor, kv_heads, head_dim]
        pool = self.memory.pool.view(layout.dtype).view(tensors, num_blocks, block_size, -1, *heads)
        space = self.memory.space.view(layout.dtype)
        space = space.view(tensors, max_num_seqs, self._width * block_size, -1, *heads)
        self.k, self.v = _by_layer(pool)
        self.stores = [self.k + self.v]
        self.k_slots, self.v_slots = _by_layer(space)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future | None = None

    def attend(self, q: Tensor, batch: Batch, layer: int, scale: float, sliding_window: int | None = None) -> Tensor:
        """Attention without block tables: each sequence's context is contiguous in its slot."""
        assert batch.virtual_slots is not None
        lens = (batch.context_lens_list, batch.query_lens)
        return slot_attention.attention(
            q, self.k_slots[layer], self.v_slots[layer], batch.virtual_slots, *lens, scale, sliding_window
        )

    @property
    def use(self) -> MemoryUse:
        memory, size = self.memory, self.memory.page_bytes
        return MemoryUse(memory.num_places * size, memory.num_pages * size, len(memory.mapped) * size)

    def remap(self, maps: PageMaps) -> None:
        """Maps what this step needs, and starts to map what the next step will need.

        Raises the error of a mapping, also of one that the previous step started; ``maps.done`` is False then.
        """
        self.wait()
        self._apply(maps.unmaps, maps.maps)
        if not maps.background:
            self._apply(maps.ahead_unmaps, maps.ahead)
        maps.done = True
        if maps.background and maps.ahead:
            self._thread = self._thread or ThreadPoolExecutor(1, "minipaged-map")
            self._ahead = self._thread.submit(self._apply_ahead, maps)

    def wait(self) -> None:
        """Waits until nothing is being mapped in the background; raises the error of a mapping there."""
        if self._ahead is None:
            return
        try:
            self._ahead.result()
        finally:
            if self._ahead.done():  # not if Ctrl-C interrupted the wait
                self._ahead = None

    def _apply_ahead(self, maps: PageMaps) -> None:
        try:
            self._apply(maps.ahead_unmaps, maps.ahead)
        except BaseException:
            maps.done = False
            raise

    def _apply(self, unmaps: Iterable[PageMap], maps: Iterable[PageMap]) -> None:
        for slot, logical, _, count in _runs(unmaps):
            for tensor in self._tensors:
                self.memory.unmap(self._place(tensor, slot, logical), count)
        for slot, logical, page, count in _runs(maps):
            for tensor in self._tensors:
                self.memory.map(self._place(tensor, slot, logical), tensor * self.num_blocks + page, count)

    def _place(self, tensor: int, slot: int, logical: int) -> int:
        return (tensor * self._slots + slot) * self._width + logical


class MappingRunner(WrappedRunner):
    """Applies a plan's mappings before anything else is executed."""

    def execute(self, plan: StepPlan) -> Any:
        if plan.maps is not None:
            self.kv_cache.remap(plan.maps)
        return self.inner.execute(plan)


def _by_layer(tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each layer: [tensors, X, tokens, layers in a tensor, …] → twice layers × [X, tokens, …]."""
    layers = [layer for tensor in tensors for layer in tensor.unbind(dim=2)]
    return layers[: len(layers) // 2], layers[len(layers) // 2 :]


def _runs(maps: Iterable[PageMap]) -> Iterator[tuple[int, int, int, int]]:
    """(slot, logical, page, count): one call maps neighbours in a slot that are also neighbours in the pool."""
    run: list[int] = []
    for slot, logical, page in maps:
        if run and (slot, logical, page) == (run[0], run[1] + run[3], run[2] + run[3]):
            run[3] += 1
            continue
        if run:
            yield run[0], run[1], run[2], run[3]
        run = [slot, logical, page, 1]
    if run:
        yield run[0], run[1], run[2], run[3]


def _page_memory(device: torch.device, page_bytes: int, num_pages: int, num_places: int) -> PageMemory:
    if device.type == "cuda":
        from minipaged.features.vattention.cuda_memory import CudaMemory

        return CudaMemory(page_bytes, num_pages, num_places, device)
    return HostMemory(page_bytes, num_pages, num_places)
