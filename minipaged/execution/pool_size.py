"""Sizes the block pool: how many KV blocks fit into the device's free memory."""

from __future__ import annotations

import torch

from minipaged.errors import InvalidConfig


def blocks_that_fit(
    bytes_per_block: int, device: torch.device, *, wanted: int | None, useful: int, swap_blocks: int | None = 0
) -> int:
    """The number of blocks that the pool gets.

    It is ``wanted``, if given; raises `InvalidConfig` if that does not fit into free memory. Otherwise as many as fit
    into half of a CPU's free memory (other programs need some too) or 90% of a GPU's, but at most ``useful``: what the
    running batch can fill. A CPU's memory must also hold the ``swap_blocks``; ``None``: as many as the pool's.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else memory that an earlier engine freed still counts as used
        free, share = torch.cuda.mem_get_info(device)[0], 0.9
    else:
        import psutil  # imported here because an engine on a GPU does not need it

        free, share = psutil.virtual_memory().available, 0.5

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
            f"num_blocks = {wanted} takes {wanted * bytes_per_block / 1e9:.1f} GB of KV cache, but {device} has "
            f"{free / 1e9:.1f} GB free: {most(free)} blocks at most, swap space included"
        )
    return wanted
