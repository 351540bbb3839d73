"""Speculative decoding: drafts several tokens and verifies them in one step; the output distribution does not change.

A step reads all weights of the model whether it computes one token of a sequence or five. So a decoding sequence brings
a *draft* of the next tokens, and takes the accepted ones and one more (Leviathan et al. 2023; Chen et al. 2023). Adds
``speculate`` ("prompt-lookup", or a smaller model) and ``num_speculative_tokens``.

A draft exists only on the plan. Until its tokens are accepted, they are neither in the sequence nor in the prefix
cache, so there is little to undo: blocks that hold nothing else return to the pool, and slots are overwritten.

Hooks: `Stage.planned` (drafts), `Stage.sampled` (accept, reject); `MemoryManager.trim`; on the runner's side
`DraftRunner` lets a draft model write the drafts. Read `drafts` first, then the verification in
`features.full_sampler`. The page shows it in the scenario "Speculation: tokens taken back".
"""

from typing import Any

from minipaged.errors import InvalidConfig

PROMPT_LOOKUP = "prompt-lookup"


def check(config: Any) -> None:
    """Raises `InvalidConfig` for an `EngineConfig` with invalid speculation settings."""
    if config.speculate is not None and (not isinstance(config.speculate, str) or not config.speculate):
        raise InvalidConfig(f"speculate must be {PROMPT_LOOKUP!r} or name a draft model, not {config.speculate!r}")
    if config.num_speculative_tokens is not None and config.speculate is None:
        raise InvalidConfig("num_speculative_tokens has no effect without speculate; set both or neither")
    if config.drafts_with_model and config.memory == "vattention":
        raise InvalidConfig(
            'memory="vattention" maps the KV cache of one model, and a draft model has its own; '
            f'use speculate="{PROMPT_LOOKUP}" or memory="paged"'
        )
