"""Eviction policies for the prefix cache; three of them use predictions (Antoniadis et al., ICML 2023).

Adds ``eviction`` (a policy by name) and ``eviction_policy`` (your own policy, see `core.prefix_cache.EvictionPolicy`).

Hooks: `EvictionPolicy`; for policies that predict, the `Stage` in `predictions` asks for one bit when a request starts
(``planned``) and stores it with the request's blocks when they are freed (``releasing``). Read `policies` first. The
page shows it in the scenario "Who comes back?".
"""

from typing import Any

from minipaged.errors import InvalidConfig

EVICTIONS = ("lru", "fifo", "marker", "flush-when-all-0", "mark-0", "mark-and-predict")


def check(config: Any) -> None:
    """Raises `InvalidConfig` for an `EngineConfig` with invalid eviction settings."""
    if config.eviction is not None and config.eviction not in EVICTIONS:
        raise InvalidConfig(f"eviction must be one of {', '.join(EVICTIONS)}, not {config.eviction!r}")
    if config.eviction_policy is not None and not (config.caches_prefixes and callable(config.eviction_policy)):
        raise InvalidConfig("eviction_policy must be callable and return a policy; it needs enable_prefix_caching=True")
    if config.eviction is not None and (config.eviction_policy is not None or not config.caches_prefixes):
        raise InvalidConfig("eviction needs enable_prefix_caching=True, and excludes eviction_policy")
