"""Memory as before paging: contiguous, as long as a sequence may ever get (Orca; PagedAttention paper, §6.1).

How long that is, is decided at admission: *Max* takes the longest a sequence can be, *Pow2* the prompt and the output
rounded up to a power of two, *Oracle* exactly what will be needed, as only a benchmark can know. Nothing grows, so no
request is preempted; nothing is found again, so there is no prefix cache. A chunk's blocks make a block table like any
other, and the same kernels run: the waste that it shows is measured.

Adds ``memory="orca-max"``, ``"orca-pow2"`` and ``"orca-oracle"``. It is a `core.seams.MemoryManager`. Read
`contiguous_tables` first, then `buddy`. The page shows it in the scenario "Holes in contiguous memory".
"""

from typing import Any

from minipaged.errors import InvalidConfig


def check(config: Any) -> None:
    """Raises `InvalidConfig` for what an `EngineConfig` asks of a contiguous manager and it cannot do."""
    caching = config.enable_prefix_caching or config.eviction_policy is not None or config.eviction is not None
    if config.memory.startswith("orca-") and (caching or config.preemption != "recompute"):
        raise InvalidConfig(
            f"memory={config.memory!r} neither shares prefixes nor preempts: leave enable_prefix_caching, "
            "eviction, eviction_policy and preemption as they are by default"
        )
