"""BatchLLM: a batch known as a whole runs in groups of prompts that begin alike (Zheng et al., arXiv 2412.03594).

Adds `Engine.add_batch` and ``schedule="batchllm"``. The first request of a group computes what the group shares; the
others wait for it. The prefix is kept until the whole group has ended, and nothing else is looked up in the prefix
cache for them, so that exactly what was planned is saved.

Hooks: an `AdmissionPolicy` around the engine's own (``eligible``, ``limits``, ``hits``), and a `Stage` (``committed``
and ``releasing`` keep prefixes, ``finished`` ends groups, ``reclaim`` gives prefixes up). Both are plugged in by the
first `add_batch`; an engine that serves no batch has neither. Read `planning` first (which prompts form a group), then
`groups`. The page shows it in the scenario "A batch in groups".
"""

from typing import Any

from minipaged.errors import InvalidConfig, InvalidRequest

SCHEDULES = ("fcfs", "batchllm")


def check(config: Any, schedule: str) -> None:
    """Raises `InvalidRequest` for an unknown schedule, `InvalidConfig` if an engine of this config cannot follow it."""
    if schedule not in SCHEDULES:
        raise InvalidRequest(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    able = config.memory == "paged" and config.caches_prefixes and config.batching == "continuous"
    if schedule == "batchllm" and not able:
        raise InvalidConfig(
            'schedule="batchllm" shares what prompts begin with: it needs memory="paged", batching="continuous", '
            "and enable_prefix_caching left on"
        )
