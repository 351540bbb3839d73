"""Moving blocks between the GPU and the CPU's memory (PagedAttention paper §4.5: swapping).

    pool on the GPU        [·][3][·][7][·][·]                 a victim's blocks lie anywhere in the pool,
                               │     │   ▲                    and go anywhere in the swap space
              swap_out ────────┼─────┘   │
                               ▼         └──── swap_in
    swap space (pinned)    [·][·][3][7][2][·]

A copy by the driver for each block and layer would be thousands of small ones. Instead the kernel of `copy_blocks.py`
writes to (reads from) *pinned* memory of the CPU, which the GPU reaches over the bus at its own address: one launch,
no staging buffer. The host does not wait for it. It goes on the stream of the model, since the step that swaps a block
out may fill it anew, and must find it read by then.
"""

from __future__ import annotations

from torch import Tensor

from minipaged.kernels import reference
from minipaged.kernels.copy_blocks import launch_copies


def swap_blocks(sources: list[Tensor], targets: list[Tensor], src: Tensor, dst: Tensor) -> None:
    """`reference.swap_blocks` in one launch, where the memory on the CPU is pinned. src, dst: [pairs] int64, CPU."""
    on_gpu = sources[0] if sources[0].is_cuda else targets[0]
    if on_gpu.is_cuda and not (sources[0].is_pinned() or targets[0].is_pinned()):
        return reference.swap_blocks(sources, targets, src, dst)
    launch_copies(sources, targets, src, dst, on_gpu.device)
