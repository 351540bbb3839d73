"""BatchLLM: runs a batch that is known in advance, in groups with a common prefix (Zheng et al., arXiv 2412.03594).

Adds `Engine.add_batch` and ``schedule="batchllm"``. The first request of a group computes the group's prefix; the
others wait for it. The prefix is kept until the whole group has ended. The group's requests use no other hits of the
prefix cache, so that the engine saves exactly what was planned.

Hooks: an `AdmissionPolicy` around the engine's own (``eligible``, ``limits``, ``hits``), and a `Stage` (``committed``
and ``releasing`` keep prefixes, ``finished`` ends groups, ``reclaim`` releases prefixes). The first `add_batch` plugs
both in; an engine that serves no batch has neither. Read `planning` first (which prompts form a group), then `groups`.
The page shows it in the scenario "A batch in groups".
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
            'schedule="batchllm" shares prompt prefixes: it needs memory="paged", batching="continuous", '
            "and enable_prefix_caching left on"
        )
