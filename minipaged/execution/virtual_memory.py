"""vAttention's memory: a sequence's keys and values lie side by side in *virtual* memory (Prabhu et al., ASPLOS 2025).

Far more address space is reserved than there is memory: for each of ``max_num_seqs`` *slots*, in every layer, a range
that could hold the longest sequence. Physical memory is a pool of *page-groups*, the blocks of the paged manager. One
is mapped into a slot when the sequence there grows into it; so attention may take the slot for one contiguous tensor,
and needs no block table. Which page-group goes where is decided in ``minipaged.memory.managers.virtual``, done here.

A page-group can be seen at several addresses: in the *pool*, where all lie in the order of their numbers (tokens are
stored, blocks copied and swapped there), and in every slot that it is mapped into (attention reads there).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minipaged.errors import InvalidConfig
from minipaged.execution.kv_cache import KVCache
from minipaged.memory.managers.virtual import PageMap, PageMaps

PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0x0, 0x10, 0x4000  # of <sys/mman.h>; Python's mmap module has the others
USUAL_BLOCK_SIZE = 16  # tokens; a page-group is the smallest multiple of a page that holds so many


class PageMemory:
    """A pool of ``num_pages`` physical page-groups of ``page_bytes`` each, and addresses for ``num_places`` of them.

    ``pool`` [num_pages · page_bytes] and ``space`` [num_places · page_bytes] are uint8 tensors over the two. To touch a
    place of ``space`` that shows no page kills the process (on a CPU) or the CUDA context, as any wild pointer does.
    The memory is given back when this object and all tensors over it are gone, whichever is last.
    """

    pool: Tensor
    space: Tensor

    def __init__(self, page_bytes: int, num_pages: int, num_places: int) -> None:
        self.page_bytes, self.num_pages, self.num_places = page_bytes, num_pages, num_places
        self.mapped: set[int] = set()  # places that show a page

    def map(self, place: int, page: int, count: int) -> None:
        """Places [place, place + count) show pages [page, page + count), whatever they showed before."""
        raise NotImplementedError

    def unmap(self, place: int, count: int) -> None:
        """Places [place, place + count) show nothing any more. The pages keep their bytes."""
        raise NotImplementedError


class HostMemory(PageMemory):
    """On Linux: the pool is a file without a name and a disk (``memfd_create``), of which ``mmap`` shows parts."""

    def __init__(self, page_bytes: int, num_pages: int, num_places: int) -> None:
        super().__init__(page_bytes, num_pages, num_places)
        mapping = _HostMapping(page_bytes, num_pages, num_places)
        self._mapping = mapping
        self.pool = _tensor_at(mapping.pool, num_pages * page_bytes, owner=mapping)
        self.space = _tensor_at(mapping.space, num_places * page_bytes, owner=mapping)

    def map(self, place: int, page: int, count: int) -> None:
        readable = mmap.PROT_READ | mmap.PROT_WRITE
        self._mapping.mmap(place, count, readable, mmap.MAP_SHARED, self._mapping.fd, page * self.page_bytes)
        self.mapped.update(range(place, place + count))

    def unmap(self, place: int, count: int) -> None:
        # Not munmap: then the addresses would be free for anybody's next allocation.
        self._mapping.mmap(place, count, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.mapped.difference_update(range(place, place + count))


class _HostMapping:
    """What is to be given back to the system. Tensors hold this object, so that none of them can outlive its memory."""

    def __init__(self, page_bytes: int, num_pages: int, num_places: int) -> None:
        self.page_bytes = page_bytes
        self._libc = ctypes.CDLL(None, use_errno=True)  # whose calls let other threads run meanwhile
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.fd = os.memfd_create("minipaged-kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_pages * page_bytes)
        readable = mmap.PROT_READ | mmap.PROT_WRITE
        self.pool = self._range(num_pages, readable, mmap.MAP_SHARED, self.fd)
        # Addresses and nothing else: no access is allowed, and the system sets no memory aside.
        self.space = self._range(num_places, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1)

    def mmap(self, place: int, count: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        """Replaces what ``count`` places of the space show, in one step for all who look."""
        self._call(self.space + place * self.page_bytes, count, protection, flags | MAP_FIXED, fd, offset)

    def _range(self, count: int, protection: int, flags: int, fd: int) -> int:
        address = self._call(None, count, protection, flags, fd, 0)
        weakref.finalize(self, self._libc.munmap, address, count * self.page_bytes)
        return address

    def _call(self, address: int | None, count: int, protection: int, flags: int, fd: int, offset: int) -> int:
        result = self._libc.mmap(address, count * self.page_bytes, protection, flags, fd, offset)
        if result == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap of {count} page-groups of {self.page_bytes} bytes: {os.strerror(code)}")
        return result


def _tensor_at(address: int, num_bytes: int, owner: object) -> Tensor:
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
    buffer.owner = owner  # type: ignore[attr-defined]  # a tensor keeps its buffer alive, and the buffer its owner
    return torch.frombuffer(buffer, dtype=torch.uint8)


@dataclass(frozen=True)
class Layout:
    """How layers lie in virtual tensors: one for the keys and one for the values of each layer, or, with
    ``tensor_slicing``, one each for all layers together, of which a layer is a slice (vAttention §5.3.4).

    A page-group then holds the tokens of all layers, so fewer of them: finer granularity for the same page size.
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
        """Tokens of a page-group: ``wanted``, or for ``None`` the fewest that work and are not below 16.

        Raises `InvalidConfig`, naming what works, if page-groups of ``wanted`` tokens do not fill whole pages, or if
        they are so small that the system could not keep count of them.
        """
        page, limit = page_size(device), _most_mappings(device)
        unit = page // math.gcd(page, self.token_bytes)
        ranges = self.num_tensors * max_num_seqs  # each of ceil(max_model_len / block_size) page-groups
        if ranges > limit:
            raise InvalidConfig(
                f"{max_num_seqs} slots in {self.num_tensors} tensors are more pieces of memory than the {limit} that "
                "this system lets a process map (vm.max_map_count): take fewer max_num_seqs, or tensor_slicing=True"
            )
        least = -(-max_model_len // (limit // ranges))
        size = wanted or -(-max(least, USUAL_BLOCK_SIZE) // unit) * unit
        if size % unit:
            raise InvalidConfig(
                f"block_size = {size} does not fill whole pages of {page} bytes, of which a token takes "
                f'{self.token_bytes}: with memory="vattention" it must be a multiple of {unit} here '
                f"({unit}, {2 * unit}, {3 * unit}, …), or left out"
            )
        if size < least:
            raise InvalidConfig(
                f"page-groups of {size} tokens may need {ranges * -(-max_model_len // size)} memory mappings, and this "
                f"system allows {limit} (vm.max_map_count): take a block_size of {-(-least // unit) * unit} or more, "
                "tensor_slicing=True, or less of max_num_seqs or max_model_len"
            )
        return size


def page_size(device: torch.device) -> int:
    """Bytes of the smallest piece of memory that can be mapped. `InvalidConfig` where nothing can."""
    if device.type == "cuda":
        from minipaged.execution.cuda_memory import granularity

        return granularity(device)
    if device.type != "cpu" or sys.platform != "linux":
        raise InvalidConfig(
            f'memory="vattention" maps memory by hand, which works on Linux (CPU) and CUDA, not with {device.type} on '
            f'{sys.platform}; use memory="paged"'
        )
    return mmap.PAGESIZE


def _most_mappings(device: torch.device) -> int:
    """How many pieces of memory this process may map, with a tenth left for everybody else in it."""
    if device.type == "cuda":
        return sys.maxsize
    return int(Path("/proc/sys/vm/max_map_count").read_text()) // 10 * 9


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of address space reserved, of physical memory in the pool, and of address space that shows a page now.

    A page-group that two slots share counts twice in ``mapped``, which may therefore exceed ``physical``.
    """

    reserved: int
    physical: int
    mapped: int


class VirtualKVCache(KVCache):
    """A KV cache whose blocks also appear, in order, in the slots of the sequences that own them.

    Beside ``k[layer]`` and ``v[layer]`` [num_blocks, block_size, kv_heads, head_dim], the pool, there are
    ``k_slots[layer]`` and ``v_slots[layer]`` [max_num_seqs, max_model_len (rounded up to blocks), kv_heads, head_dim].
    Of a slot only what `remap` has mapped may be touched. Raises `InvalidConfig` as `Layout.block_size` does.
    """

    def __init__(
        self,
        layout: Layout,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        swap_blocks: int = 0,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        heads = (layout.num_kv_heads, layout.head_dim)
        super().__init__(layout.num_layers, 0, block_size, *heads, layout.dtype, device, swap_blocks)
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
        self._stores = [self.k + self.v]
        self.k_slots, self.v_slots = _by_layer(space)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future | None = None

    @property
    def use(self) -> MemoryUse:
        memory, size = self.memory, self.memory.page_bytes
        return MemoryUse(memory.num_places * size, memory.num_pages * size, len(memory.mapped) * size)

    def remap(self, maps: PageMaps) -> None:
        """Maps what this step needs, and begins with what the next will.

        Raises what a mapping raised, be it one that was begun in the step before; ``maps.done`` is False then.
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
        """Returns when nothing is being mapped in the background; raises what went wrong there."""
        if self._ahead is None:
            return
        try:
            self._ahead.result()
        finally:
            if self._ahead.done():  # not if Ctrl-C ended the waiting
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


def _by_layer(tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each layer: [tensors, X, tokens, layers in a tensor, …] → twice layers × [X, tokens, …]."""
    layers = [layer for tensor in tensors for layer in tensor.unbind(dim=2)]
    return layers[: len(layers) // 2], layers[len(layers) // 2 :]


def _runs(maps: Iterable[PageMap]) -> Iterator[tuple[int, int, int, int]]:
    """(slot, logical, page, count): neighbours in a slot that are neighbours in the pool too are mapped by one call."""
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
        from minipaged.execution.cuda_memory import CudaMemory

        return CudaMemory(page_bytes, num_pages, num_places, device)
    return HostMemory(page_bytes, num_pages, num_places)
