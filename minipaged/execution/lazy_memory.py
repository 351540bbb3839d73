"""Memory that the system commits page by page, as it is written: a KV pool costs what it holds, not what it could hold.

``torch.zeros`` writes every byte: a pool of 1 GiB then takes 1 GiB at once, and most of it is never read. An anonymous
private mapping reads as zeros, too, and takes memory page by page at the first write.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from minipaged.errors import InvalidConfig


def zeros(shape: Seq[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.zeros``; on a CPU, the system commits the memory as it is written.

    The memory is unmapped when the last tensor over it is gone.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # a limit of the process, or a system that promises no more than it has
        raise InvalidConfig(f"the system refuses {size:,} bytes for KV ({error}); set a smaller kv_memory") from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # each layer's first token would commit 2 MB: 120 MB in a model of 30 layers
        try:
            area.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:  # a kernel without huge pages
            pass
    return torch.frombuffer(area, dtype=dtype).view(shape)  # the tensor keeps the mapping alive


def committed(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' storages that are in memory now. Counts all of one where the system does not tell."""
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(_resident(storage) for storage in storages.values())


def _resident(storage: torch.UntypedStorage) -> int:
    size, page = storage.nbytes(), mmap.PAGESIZE
    if storage.device.type != "cpu" or os.name != "posix":
        return size
    start = storage.data_ptr() // page * page
    states = ctypes.create_string_buffer(-(-(storage.data_ptr() + size - start) // page))
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(states) * page), states):
        return size
    return min(size, sum(state & 1 for state in states.raw) * page)
