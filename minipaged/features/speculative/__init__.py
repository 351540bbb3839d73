"""Speculative decoding: tokens are guessed and verified together; the model keeps those it would have sampled itself.

A step reads all weights of the model whether it computes one token of a sequence or five. So a decoding sequence brings
a *draft* of the next tokens, and takes those that were guessed right and one more (Leviathan et al. 2023; Chen et al.
2023). Adds ``speculate`` ("prompt-lookup", or a smaller model) and ``num_speculative_tokens``.

A draft is on the plan and nowhere else. Until its tokens are accepted, neither the sequence nor the prefix cache knows
of them, so there is little to rewind: blocks that hold nothing else go back to the pool, and slots are written anew.

Hooks: `Stage.planned` (drafts), `Stage.sampled` (accept, reject); `MemoryManager.trim`; on the runner's side
`DraftRunner` lets a draft model write the drafts. Read `drafts` first, then the verification in `features.sampler`.
The page shows it in the scenario "Speculation: tokens taken back".
"""

from typing import Any

from minipaged.errors import InvalidConfig

PROMPT_LOOKUP = "prompt-lookup"


def check(config: Any) -> None:
    """Raises `InvalidConfig` for an `EngineConfig` whose speculation cannot work."""
    if config.speculate is not None and (not isinstance(config.speculate, str) or not config.speculate):
        raise InvalidConfig(f"speculate must be {PROMPT_LOOKUP!r} or name a draft model, not {config.speculate!r}")
    if config.num_speculative_tokens is not None and config.speculate is None:
        raise InvalidConfig("num_speculative_tokens has no effect without speculate; set both or neither")
    if config.drafts_with_model and config.memory == "vattention":
        raise InvalidConfig(
            'memory="vattention" maps the KV cache of one model, and a draft model has its own; '
            f'use speculate="{PROMPT_LOOKUP}" or memory="paged"'
        )
