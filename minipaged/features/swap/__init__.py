"""Swapping: a preempted request keeps its KV in CPU memory instead of recomputing it (PagedAttention paper, §4.5).

Adds ``preemption="swap"`` and ``swap_blocks``. vLLM V1 has dropped swapping; it is here because the paper compares it.

Hooks: `Stage.preempting` (moves the victim's blocks to the swap space), `before_admission` (swaps requests in, and
admits no other until they are), `releasing`, `finished`, `requests`, `failed`, `check`; on the runner's side
`SwapRunner` executes ``plan.swap_outs`` and ``plan.swap_ins``. Read `swap_tables` first, then `swap_stage`. The page
shows it in the scenario "Out of memory: swap".
"""

from typing import Any

from minipaged.errors import InvalidConfig

PREEMPTIONS = ("recompute", "swap")


def check(config: Any) -> None:
    """Raises `InvalidConfig` for an `EngineConfig` with a swap space but without swapping."""
    if config.swap_blocks is not None and config.preemption != "swap":
        raise InvalidConfig('swap_blocks has no effect without preemption="swap"; set both or neither')
