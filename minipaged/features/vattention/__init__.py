"""vAttention: paged memory that is contiguous for attention (Prabhu et al., ASPLOS 2025, arXiv 2405.04437).

Blocks are mapped, in order, into a range of virtual addresses per sequence, so that attention needs no block tables.
Adds ``memory="vattention"``, ``mapping`` and ``tensor_slicing`` (Linux CPU, and CUDA).

Hooks: a `MemoryManager` (`VirtualTables`, over the core's block tables), a `Stage` (``planned`` adds the mappings
last), and on the runner's side `MappingRunner` (``plan.maps``) and `VirtualKVCache`. Read `virtual_tables` first, then
`virtual_memory`; `cuda_memory` does the same on a GPU, and `slot_attention` replaces paged attention. The page shows it
in the scenario "The same requests, paged", with *Settings* → memory.
"""

from typing import Any

from minipaged.errors import InvalidConfig

MAPPINGS = ("sync", "eager", "async")


def check(config: Any) -> None:
    """Raises `InvalidConfig` if an `EngineConfig` asks vAttention for something that it does not support."""
    if not isinstance(config.tensor_slicing, bool):
        raise InvalidConfig(f"tensor_slicing must be True or False, not {config.tensor_slicing!r}")
    if config.mapping is not None and config.mapping not in MAPPINGS:
        raise InvalidConfig(f"mapping must be one of {', '.join(MAPPINGS)}, not {config.mapping!r}")
    if config.memory != "vattention" and (config.tensor_slicing or config.mapping is not None):
        raise InvalidConfig('tensor_slicing and mapping have no effect without memory="vattention"')
    if config.memory == "vattention" and (
        config.attention in ("triton", "native", "flex") or config.kv_dtype != "auto"
    ):
        raise InvalidConfig(
            'memory="vattention" uses attention by plain torch on unquantized keys and values; '
            "leave attention and kv_dtype out"
        )
