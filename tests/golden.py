"""A digest of everything the engine does: SHA-256 over all events of a few hundred random runs, per configuration.

A change of structure must leave the digests as they are. A change of behaviour renews them in a commit of its own:

    python -m tests.golden          # writes tests/golden.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from minipaged import SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.events.waste import AHEAD
from minipaged.features.batchllm.groups import BatchItem
from minipaged.features.eviction.policies import BY_NAME
from tests.fake import fake_engine, guess_at_random, random_prompt
from tests.features.test_virtual import virtual_engine

FILE = Path(__file__).with_suffix(".json")
SEEDS = 24  # runs per configuration

SWAP: dict[str, Any] = {"preemption": "swap", "swap_blocks": 12}
DRAFTS: dict[str, Any] = {"speculate": "prompt-lookup", "num_speculative_tokens": 5}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "paged": {},
    "no prefix cache": {"enable_prefix_caching": False},
    "swap": SWAP,
    "static": {"batching": "static"},
    "static, swap": {"batching": "static"} | SWAP,
    "speculation": DRAFTS,
    "speculation, swap": DRAFTS | SWAP,
    "speculation, static": DRAFTS | {"batching": "static"},
    **{memory: {"memory": memory} for memory in AHEAD},
    "orca-pow2, speculation": {"memory": "orca-pow2"} | DRAFTS,
    **{
        f"vattention, {mapping}": {"memory": "vattention", "mapping": mapping} for mapping in ("sync", "eager", "async")
    },
    "vattention, swap, speculation": {"memory": "vattention"} | SWAP | DRAFTS,
    "vattention, mark-0": {"memory": "vattention", "eviction": "mark-0"},
    **{f"eviction {name}": {"eviction": name} for name in BY_NAME},
    "eviction mark-0, swap": {"eviction": "mark-0"} | SWAP,
    "groups": {"groups": True},
    "groups, swap": {"groups": True} | SWAP,
    "groups, speculation, swap": {"groups": True} | SWAP | DRAFTS,
    "groups, flush-when-all-0": {"groups": True, "eviction": "flush-when-all-0"},
}


def digests() -> dict[str, str]:
    """The digest of each configuration."""
    found = {}
    for name, settings in CONFIGURATIONS.items():
        sha = hashlib.sha256()
        for seed in range(SEEDS):
            for event in events_of(f"{name}/{seed}", **settings):
                sha.update(json.dumps(event, sort_keys=True).encode())
        found[name] = sha.hexdigest()
    return found


def events_of(seed: str, groups: bool = False, **settings: Any) -> Iterator[dict[str, Any]]:
    """All events of one random run, without the seconds that its steps took."""
    random = Random(seed)
    size, num_seqs = random.randint(1, 8), random.randint(2, 6)
    make = virtual_engine if settings.get("memory") == "vattention" else fake_engine
    slots = random.randint(60, 240) if settings.get("memory") in AHEAD else random.randint(24, 90)
    engine = make(
        block_size=size,
        num_blocks=max(4, slots // size),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs + random.randint(0, 20),
        max_model_len=random.randint(30, 120),
        **settings,
    )
    if "speculate" in settings:
        guess_at_random(engine, random, right=random.choice((0.6, 0.9)))
    told: list[dict[str, Any]] = []
    engine.events.subscribe(
        lambda event: told.append(
            {k: v for k, v in event.to_dict().items() if k != "rank" or v is not None}
            | ({"seconds": 0} if event.type == "step_finished" else {})
        )
    )
    arrivals = sorted(random.randint(0, 10) for _ in range(random.randint(3, 7)))
    names: list[str] = []

    def arrive() -> None:
        names.append(f"r{len(names)}")
        try:
            engine.add_request(names[-1], random_prompt(random, 20), random_params(random))
        except InvalidRequest as error:
            told.append({"refused": type(error).__name__})

    if groups:
        stems = [[random.randrange(50) for _ in range(random.randint(1, 14))] for _ in range(3)]
        prompts = [random.choice(stems) + random_prompt(random, 4) for _ in range(random.randint(3, 10))]
        try:
            engine.add_batch([BatchItem(f"b{i}", prompt, random_params(random)) for i, prompt in enumerate(prompts)])
        except InvalidRequest as error:
            told.append({"refused": type(error).__name__})
    for step in range(5000):
        while arrivals and (arrivals[0] <= step or not engine.has_unfinished()):
            arrivals.pop(0)
            arrive()
        if names and random.random() < 0.05:
            victim = random.choice(names)
            if random.random() < 0.5:
                engine.abort(victim)
            else:
                try:
                    names.append(engine.fork(victim))
                except InvalidRequest:
                    pass
        engine.step()
        engine.check()
        told.append({"held": list(engine.held()), "tables": {str(k): v for k, v in engine.block_tables().items()}})
        if not arrivals and not engine.has_unfinished():
            break
    else:
        raise AssertionError("no progress")
    yield from told


def random_params(random: Random) -> SamplingParams:
    length: dict[str, Any] = {"max_tokens": random.randint(1, 20), "ignore_eos": random.random() < 0.5}
    if random.random() < 0.25:
        width = random.randint(1, 3)
        return SamplingParams(temperature=0, beam_width=width, n=random.randint(1, width), **length)
    return SamplingParams(n=random.choice((1, 1, 2, 3)), **length)


if __name__ == "__main__":
    FILE.write_text(json.dumps(digests(), indent=1) + "\n", encoding="utf-8")
