"""Physical page-groups and addresses to map them at: on Linux through ``mmap`` (on a GPU: `cuda_memory`)."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import torch
from torch import Tensor

PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0x0, 0x10, 0x4000  # of <sys/mman.h>; Python's mmap module has the others


class PageMemory:
    """A pool of ``num_pages`` physical page-groups of ``page_bytes`` each, and addresses for ``num_places`` of them.

    ``pool`` [num_pages · page_bytes] and ``space`` [num_places · page_bytes] are uint8 tensors over the two. An access
    to a place of ``space`` without a page kills the process (on a CPU) or the CUDA context, like any invalid pointer.
    The memory is freed when this object and all tensors over it are gone, whichever is last.
    """

    pool: Tensor
    space: Tensor

    def __init__(self, page_bytes: int, num_pages: int, num_places: int) -> None:
        self.page_bytes, self.num_pages, self.num_places = page_bytes, num_pages, num_places
        self.mapped: set[int] = set()  # places with a page

    def map(self, place: int, page: int, count: int) -> None:
        """Maps pages [page, page + count) at places [place, place + count), which may replace earlier mappings."""
        raise NotImplementedError

    def unmap(self, place: int, count: int) -> None:
        """Unmaps places [place, place + count). The pages keep their bytes."""
        raise NotImplementedError


class HostMemory(PageMemory):
    """Page memory on Linux: the pool is an anonymous file in memory (``memfd_create``), mapped in parts by ``mmap``."""

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
        # Not munmap: it would release the addresses, and any other allocation could take them.
        self._mapping.mmap(place, count, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.mapped.difference_update(range(place, place + count))


class _HostMapping:
    """Owns system resources that must be freed. Tensors reference it, so that none can outlive its memory."""

    def __init__(self, page_bytes: int, num_pages: int, num_places: int) -> None:
        self.page_bytes = page_bytes
        self._libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.fd = os.memfd_create("minipaged-kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_pages * page_bytes)
        readable = mmap.PROT_READ | mmap.PROT_WRITE
        self.pool = self._range(num_pages, readable, mmap.MAP_SHARED, self.fd)
        # Reserves addresses only: no access is allowed, and the system reserves no memory.
        self.space = self._range(num_places, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1)

    def mmap(self, place: int, count: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        """Replaces the mapping of ``count`` places of the space, atomically for all readers."""
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
