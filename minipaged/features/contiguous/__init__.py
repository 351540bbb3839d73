"""Contiguous KV memory, as before paging: a sequence reserves its longest possible length (Orca; PagedAttention, §6.1).

The length is chosen at admission: *Max* reserves the longest that a sequence can be, *Pow2* the prompt plus the output
rounded up to a power of two, *Oracle* exactly what will be needed, which only a benchmark can know. Reservations never
grow, so no request is preempted; there is no prefix cache. A chunk's blocks form an ordinary block table, and the same
kernels run, so the waste that the page shows is measured.

Adds ``memory="orca-max"``, ``"orca-pow2"`` and ``"orca-oracle"``. It is a `core.seams.MemoryManager`. Read
`contiguous_tables` first, then `buddy`. The page shows it in the scenario "Holes in contiguous memory".
"""

from typing import Any

from minipaged.errors import InvalidConfig


def check(config: Any) -> None:
    """Raises `InvalidConfig` if an `EngineConfig` asks a contiguous manager for something that it does not support."""
    caching = config.enable_prefix_caching or config.eviction_policy is not None or config.eviction is not None
    if config.memory.startswith("orca-") and (caching or config.preemption != "recompute"):
        raise InvalidConfig(
            f"memory={config.memory!r} neither shares prefixes nor preempts: leave enable_prefix_caching, "
            "eviction, eviction_policy and preemption as they are by default"
        )
