"""Eviction policies for the prefix cache, among them three that listen to predictions (Antoniadis et al., ICML 2023).

Adds ``eviction`` (a policy by name) and ``eviction_policy`` (one of your own, see `core.prefix_cache.EvictionPolicy`).

Hooks: `EvictionPolicy`; for policies that predict, the `Stage` in `predictions` asks for a bit when a request starts
(``planned``) and leaves it with the request's blocks when they are given up (``releasing``). Read `policies` first. The
page shows it in the scenario "Who comes back?".
"""

from typing import Any

from minipaged.errors import InvalidConfig

EVICTIONS = ("lru", "fifo", "marker", "flush-when-all-0", "mark-0", "mark-and-predict")


def check(config: Any) -> None:
    """Raises `InvalidConfig` for an `EngineConfig` whose eviction cannot be had."""
    if config.eviction is not None and config.eviction not in EVICTIONS:
        raise InvalidConfig(f"eviction must be one of {', '.join(EVICTIONS)}, not {config.eviction!r}")
    if config.eviction_policy is not None and not (config.caches_prefixes and callable(config.eviction_policy)):
        raise InvalidConfig("eviction_policy must make a policy when called, and needs enable_prefix_caching=True")
    if config.eviction is not None and (config.eviction_policy is not None or not config.caches_prefixes):
        raise InvalidConfig("eviction needs enable_prefix_caching=True, and no eviction_policy beside it")
