"""Sizes the block pool: how many KV blocks fit into the device's free memory, or into what the user allows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from minipaged.errors import InvalidConfig

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes of ``device`` that are free now. A CPU's: also within the limits of the process' control groups."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else memory that an earlier engine freed still counts as used
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # imported here because an engine on a GPU does not need it

    return min([int(psutil.virtual_memory().available), *_left_in_cgroups(), *_left_of_addresses()])


def _left_of_addresses() -> Iterator[int]:
    """Bytes of addresses that the process may still map, if it has a limit (``ulimit -v``)."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        import psutil

        yield max(0, limit - psutil.Process().memory_info().vms)


def _left_in_cgroups() -> Iterator[int]:
    """Bytes that each control group with a memory limit has left: a container's limits count as its machine's memory.

    A process is in a group of the hierarchy v2 (``0::/path``) or of v1's memory controller (``4:memory:/path``), and
    the limits of all groups above it hold, too. A container may see its own group as the root, under another path.
    """
    for line in _text(OWN_CGROUPS).splitlines():  # none if the system is not Linux
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path or controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        group = root if ".." in path.split("/") else root / path.strip("/")
        for folder in (group, *group.parents):
            yield from _left(folder)
            if folder == root:
                break


def _left(group: Path) -> Iterator[int]:
    """Bytes left in one control group, if it has a limit; cached files do not count, since the kernel drops them."""
    for limits, usage, files in (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    ):
        used, files_at = _text(group / usage), re.search(rf"^{files} (\d+)$", _text(group / "memory.stat"), re.M)
        kept = int(used if used.isdigit() else 0) - int(files_at[1] if files_at else 0)
        for limit in (_text(group / name) for name in limits):
            if limit.isdigit():  # not "max"
                yield max(0, int(limit) - max(0, kept))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def blocks_that_fit(
    bytes_per_block: int,
    device: torch.device,
    *,
    wanted: int | None,
    useful: int,
    swap_blocks: int | None = 0,
    kv_memory: int | None = None,
) -> int:
    """The number of blocks that the pool gets.

    It is ``wanted``, or what ``kv_memory`` bytes hold, if one of them is given; raises `InvalidConfig` if that does not
    fit into free memory. Otherwise as many as fit into half of a CPU's free memory (other programs need some too) or
    90% of a GPU's, but at most ``useful``: what the running batch can fill. A CPU's memory must also hold the
    ``swap_blocks``; ``None``: as many as the pool's.
    """
    given = f"num_blocks = {wanted}"
    if kv_memory is not None:
        wanted, given = kv_memory // bytes_per_block, f"kv_memory = {kv_memory}"
        if wanted == 0:
            raise InvalidConfig(f"{given} holds no KV block: one takes {bytes_per_block} bytes; give at least that")
    free, share = free_memory(device), 0.9 if device.type == "cuda" else 0.5

    def most(space: int) -> int:
        blocks = space // bytes_per_block
        if device.type == "cuda":
            return blocks  # its swap space is in the CPU's memory
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
            f"{given} takes {wanted * bytes_per_block / 1e9:.1f} GB of KV cache, but {device} has "
            f"{free / 1e9:.1f} GB free: {most(free)} blocks at most, swap space included"
        )
    return wanted
