"""An admission policy with priorities and deadlines: a chat goes before a batch job.

    minipaged visualize --plugin examples/priorities.py
    LLM("tiny", admission_policy=Priorities)

A request says how urgent it is in ``SamplingParams(extra_args={"priority": 0, "deadline": 30})``: a lower priority
number goes first; among equals, the request with the earlier deadline (in steps from its arrival). Without them a
request has priority 1 and no deadline. The policy turns both into one number, the request's *rank*, which stays fixed.
All queues are in the order of (rank, arrival), so the last one is what the scheduler preempts when blocks run out.
"""

from minipaged.core.request import Request
from minipaged.core.seams import FCFS
from minipaged.errors import InvalidRequest

NO_DEADLINE = 1_000_000  # steps; any deadline is earlier


class Priorities(FCFS):
    """Ranks requests by priority, then by deadline."""

    extra_args = frozenset({"priority", "deadline"})

    def rank(self, request: Request) -> float:
        priority = number(request, "priority", 1)
        within = number(request, "deadline", None)
        step = self.scheduler.step
        deadline = NO_DEADLINE - 1 if within is None else min(step + within, NO_DEADLINE - 1)
        return priority * NO_DEADLINE + deadline


def number(request: Request, name: str, default: int | None) -> int | None:
    """A whole number from the request's ``extra_args``. Raises `InvalidRequest` for anything else."""
    value = request.params.extra_args.get(name, default)
    if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InvalidRequest(f"extra_args: {name} must be a whole number of at least 0, not {value!r}")
    return value


SETTINGS = {"admission_policy": Priorities, "num_blocks": 24, "block_size": 16, "max_num_seqs": 4}

# Three stories fill the pool; then two urgent questions arrive, pass the queue, and push a story out.
SCENARIO = {
    "name": "Priorities",
    "watch": "Three stories run. At step 30 two urgent questions arrive: they go first, and a story waits for them.",
    "arrivals": [
        {"step": 0, "prompt": "Once upon a time", "extra_args": {"priority": 2}, "min_tokens": 120},
        {"step": 2, "prompt": "The robot opened the door and", "extra_args": {"priority": 2}, "min_tokens": 120},
        {"step": 4, "prompt": "One day, a fox met an owl.", "extra_args": {"priority": 2}, "min_tokens": 120},
        {"step": 30, "prompt": "What is a block table?", "extra_args": {"priority": 0}, "chat": True},
        {"step": 30, "prompt": "What is paging?", "extra_args": {"priority": 0, "deadline": 20}, "chat": True},
    ],
}
