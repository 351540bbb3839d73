"""`PageMemory` on CUDA, through the driver's virtual memory management (``cuda.bindings.driver``).

Needs the package cuda-bindings. A stock driver maps pages of 2 MiB: with ``tensor_slicing`` a page holds fewer tokens.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from minipaged.errors import InvalidConfig
from minipaged.features.vattention.page_memory import PageMemory


def granularity(device: torch.device) -> int:
    """Bytes of the smallest mapping that the driver allows."""
    driver = _driver()
    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(_ask(driver.cuMemGetAllocationGranularity(_allocation(driver, device), least)))


class CudaMemory(PageMemory):
    """Page memory on CUDA. Each page-group is a separate allocation: the driver maps and unmaps only whole ones."""

    def __init__(self, page_bytes: int, num_pages: int, num_places: int, device: torch.device) -> None:
        super().__init__(page_bytes, num_pages, num_places)
        self._mapping = mapping = _CudaMapping(page_bytes, device)
        self._pages = [mapping.create() for _ in range(num_pages)]
        pool, self._space = mapping.reserve(num_pages), mapping.reserve(num_places)
        for number, page in enumerate(self._pages):
            mapping.map(pool + number * page_bytes, page)
        self.pool = _tensor_at(pool, num_pages * page_bytes, device, owner=mapping)
        self.space = _tensor_at(self._space, num_places * page_bytes, device, owner=mapping)

    def map(self, place: int, page: int, count: int) -> None:
        for i in range(count):
            if place + i in self.mapped:
                self.unmap(place + i, 1)
            self._mapping.map(self._space + (place + i) * self.page_bytes, self._pages[page + i])
            self.mapped.add(place + i)

    def unmap(self, place: int, count: int) -> None:
        for i in range(count):
            if place + i in self.mapped:
                self._mapping.unmap(self._space + (place + i) * self.page_bytes)
                self.mapped.remove(place + i)


class _CudaMapping:
    """Owns driver resources that must be freed. Tensors reference it, so that none can outlive its memory."""

    def __init__(self, page_bytes: int, device: torch.device) -> None:
        self.page_bytes, self._device, self._driver = page_bytes, device, _driver()
        self._access = self._driver.CUmemAccessDesc()
        self._access.location = _allocation(self._driver, device).location
        self._access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._mapped: set[int] = set()  # addresses
        self._ranges: list[tuple[int, int]] = []  # address and bytes of each reservation
        self._pages: list[Any] = []
        weakref.finalize(self, _give_back, self._driver, page_bytes, self._mapped, self._ranges, self._pages)

    def create(self) -> Any:
        """Allocates a physical page-group, which is not mapped yet."""
        page = _ask(self._driver.cuMemCreate(self.page_bytes, _allocation(self._driver, self._device), 0))
        self._pages.append(page)
        return page

    def reserve(self, count: int) -> int:
        """Reserves a range of addresses without memory; returns its start."""
        num_bytes = count * self.page_bytes
        address = int(_ask(self._driver.cuMemAddressReserve(num_bytes, 0, 0, 0)))
        self._ranges.append((address, num_bytes))
        return address

    def map(self, address: int, page: Any) -> None:
        torch.cuda.set_device(self._device.index or 0)  # per thread, and this may be the background thread
        _ask(self._driver.cuMemMap(address, self.page_bytes, 0, page, 0))
        self._mapped.add(address)
        _ask(self._driver.cuMemSetAccess(address, self.page_bytes, [self._access], 1))

    def unmap(self, address: int) -> None:
        torch.cuda.synchronize(self._device)  # a kernel of the previous step may still be reading
        _ask(self._driver.cuMemUnmap(address, self.page_bytes))
        self._mapped.remove(address)


def _give_back(driver: Any, page_bytes: int, mapped: set[int], ranges: list[tuple[int, int]], pages: list[Any]) -> None:
    for address in mapped:
        driver.cuMemUnmap(address, page_bytes)
    for address, num_bytes in ranges:
        driver.cuMemAddressFree(address, num_bytes)
    for page in pages:
        driver.cuMemRelease(page)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise InvalidConfig(
            'memory="vattention" on CUDA needs the driver\'s Python bindings: pip install cuda-bindings'
        ) from None
    torch.cuda.init()
    return driver


def _ask(answer: tuple) -> Any:
    """The value in a driver call's result (error, value). Raises `RuntimeError` for an error."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver reports {error.name}")
    return values[0] if values else None


def _allocation(driver: Any, device: torch.device) -> Any:
    """The driver's description of memory on this device."""
    prop = driver.CUmemAllocationProp()
    prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = device.index or 0
    return prop


# --- tensors over addresses that torch did not hand out -------------------------------------------------------------
# DLPack states the device. Other ways ask the driver for the device of an address, which fails for a reservation.


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),  # from here on: DLManagedTensor
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


_KINDS = {"cpu": 1, "cuda": 2}  # DLDeviceType
_UINT = 1  # DLDataTypeCode
_lent: dict[int, Any] = {}  # address of a _DLTensor → what must live until torch releases it


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _returned(address: int, lent: dict[int, Any] = _lent) -> None:
    lent.pop(address, None)


ctypes.pythonapi.Py_IncRef(ctypes.py_object(_returned))  # tensors may be freed after this module, at exit


def _tensor_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """A uint8 tensor [num_bytes] over an address. ``owner`` lives until the tensor and all its views are gone."""
    shape = (ctypes.c_int64 * 1)(num_bytes)
    where = (address, _KINDS[device.type], device.index or 0)
    managed = _DLTensor(*where, 1, _UINT, 8, 1, shape, None, 0, None, _returned)
    _lent[ctypes.addressof(managed)] = (managed, shape, owner)
    capsule: Callable[..., Any] = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]  # type: ignore[attr-defined]
    return from_dlpack(capsule(ctypes.addressof(managed), b"dltensor", None))
