"""How many KV blocks fit into the memory that there is."""

from __future__ import annotations

import torch

from minipaged.errors import InvalidConfig


def blocks_that_fit(
    bytes_per_block: int, device: torch.device, *, wanted: int | None, useful: int, swap_blocks: int | None = 0
) -> int:
    """How many blocks the pool gets.

    ``wanted`` if given, unless the memory there is cannot hold it (`InvalidConfig`). Else as many as fit into half of
    a CPU's free memory (other programs need some too) or nine tenths of a GPU's, but no more than ``useful``: what the
    running batch could ever fill. A CPU's memory also has to hold the ``swap_blocks``; ``None``: as many as the pool's.
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
