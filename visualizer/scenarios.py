"""What the page plays by itself: prompts that arrive at fixed steps, so that every run is the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Small on purpose: the opening scenario must fill the pool, and one look must take all of it in.
DEMO_SETTINGS: dict[str, Any] = {
    "num_blocks": 56,
    "block_size": 16,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
}


@dataclass(frozen=True)
class Arrival:
    """One request: what is asked for, and at which step of the scenario it comes in."""

    at_step: int
    prompt: str
    n: int = 1
    max_tokens: int = 160
    temperature: float = 0.8
    seed: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Scenario:
    """A named script of arrivals, in the order of their steps."""

    name: str
    arrivals: tuple[Arrival, ...] = field(default_factory=tuple)


# Eight stories for a pool that holds about six of them. The third asks for four samples of one prompt, which
# is longer than two blocks: those stay shared, and the half-full third block shows copy-on-write.
OPENING = Scenario(
    "eight stories",
    (
        Arrival(0, "Once upon a time", seed=1),
        Arrival(6, "The robot opened the door and", seed=2),
        Arrival(
            18,
            "Once upon a time, in a small town by the sea, there lived a girl named Anna. "
            "She had a red boat and a little dog. One morning",
            n=4,
            temperature=1.0,
            seed=3,
        ),
        Arrival(28, "In a small town by the sea,", seed=4),
        Arrival(36, "The old cat sat on the wall and", seed=5),
        Arrival(44, "One day, a fox met an owl.", seed=6),
        Arrival(52, "Tell me a story about a brave mouse.", seed=7, chat=True),
        Arrival(60, "It was a cold night and", seed=8),
    ),
)
