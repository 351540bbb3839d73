"""A fake ``cuda.bindings.driver`` on top of mmap, as strict about the order of calls as the driver's documentation."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from enum import IntEnum
from types import SimpleNamespace


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


INVALID = (Result.CUDA_ERROR_INVALID_VALUE, None)
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000


class FakeDriver:
    """The driver's calls, with memory files as handles. A mapping is readable only after cuMemSetAccess."""

    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self.calls: Counter[str] = Counter()
        self.handles: dict[int, int] = {}  # fd → bytes
        self.ranges: dict[int, int] = {}  # address → bytes
        self.mapped: dict[int, int] = {}  # address → bytes
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def held(self) -> list:
        return [*self.handles, *self.ranges, *self.mapped]

    def CUmemAllocationProp(self):
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self):
        return SimpleNamespace(location=None, flags=None)

    def cuMemGetAllocationGranularity(self, prop, option):
        return Result.CUDA_SUCCESS, self.granularity

    def cuMemCreate(self, size, prop, flags):
        if size % self.granularity or flags or (prop.type, prop.location.type) != (1, 1):
            return INVALID
        handle = os.memfd_create("fake-cuda")
        os.ftruncate(handle, size)
        self.handles[handle] = size
        return Result.CUDA_SUCCESS, handle

    def cuMemRelease(self, handle):
        if handle not in self.handles:
            return (INVALID[0],)
        os.close(handle)
        del self.handles[handle]
        return (Result.CUDA_SUCCESS,)

    def cuMemAddressReserve(self, size, alignment, addr, flags):
        if size % self.granularity or size == 0:
            return INVALID
        address = self.libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        self.ranges[address] = size
        return Result.CUDA_SUCCESS, address

    def cuMemAddressFree(self, address, size):
        inside = [a for a in self.mapped if address <= a < address + size]
        if self.ranges.get(address) != size or inside:
            return (INVALID[0],)
        self.libc.munmap(address, size)
        del self.ranges[address]
        return (Result.CUDA_SUCCESS,)

    def cuMemMap(self, address, size, offset, handle, flags):
        self.calls["cuMemMap"] += 1
        reserved = any(start <= address and address + size <= start + n for start, n in self.ranges.items())
        taken = any(a < address + size and address < a + n for a, n in self.mapped.items())
        if offset or flags or taken or not reserved or self.handles.get(handle) != size:
            return (INVALID[0],)
        self.libc.mmap(address, size, 0, mmap.MAP_SHARED | MAP_FIXED, handle, 0)
        self.mapped[address] = size
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, size, desc, count):
        if self.mapped.get(address) != size or len(desc) != count or desc[0].flags != 3:
            return (INVALID[0],)
        self.libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, size):
        self.calls["cuMemUnmap"] += 1
        if self.mapped.get(address) != size:
            return (INVALID[0],)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        self.libc.mmap(address, size, 0, flags, -1, 0)
        del self.mapped[address]
        return (Result.CUDA_SUCCESS,)
