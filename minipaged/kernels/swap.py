"""Swaps KV blocks between the GPU's and the CPU's memory in one kernel launch (PagedAttention paper §4.5).

    pool on the GPU        [·][3][·][7][·][·]                 a preempted sequence's blocks lie anywhere in
                               │     │   ▲                    the pool and go anywhere in the swap space
              swap_out ────────┼─────┘   │
                               ▼         └──── swap_in
    swap space (pinned)    [·][·][3][7][2][·]

Copying each block and layer through the driver would take thousands of small copies. Instead the kernel of
`copy_blocks.py` writes to (reads from) *pinned* CPU memory, which the GPU can address over the bus: one launch,
no staging buffer. The host does not wait for it. It runs on the model's stream, because the step that swaps a block
out may fill it again, and must not do so before it has been read.
"""

from __future__ import annotations

from torch import Tensor

from minipaged.kernels import reference
from minipaged.kernels.copy_blocks import launch_copies


def swap_blocks(sources: list[Tensor], targets: list[Tensor], src: Tensor, dst: Tensor) -> None:
    """`reference.swap_blocks` in one launch, if the CPU memory is pinned. src, dst: [pairs] int64, on the CPU."""
    on_gpu = sources[0] if sources[0].is_cuda else targets[0]
    if on_gpu.is_cuda and not (sources[0].is_pinned() or targets[0].is_pinned()):
        return reference.swap_blocks(sources, targets, src, dst)
    launch_copies(sources, targets, src, dst, on_gpu.device)
