"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipaged.config import ATTENTIONS, DEVICES, DTYPES, EVICTIONS, KV_DTYPES, MANAGERS, EngineConfig, SamplingParams

if TYPE_CHECKING:
    from minipaged.llm import LLM

DEFAULT = EngineConfig()

# One not given is None and left to EngineConfig or SamplingParams, which know the defaults and limits.
Model = Annotated[str, typer.Option(help="'tiny' (embedded), a directory (Hugging Face), or a hub id.")]
Device = Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")]
Dtype = Annotated[str, typer.Option(help=f"Of weights and KV cache: {', '.join(DTYPES)}.")]
Memory = Annotated[str | None, typer.Option(help=f"Who decides on slots: {', '.join(MANAGERS)}.")]
Eviction = Annotated[str | None, typer.Option(help=f"Which cached block is given up first: {', '.join(EVICTIONS)}.")]
Attention = Annotated[str | None, typer.Option(help=f"What computes it: {', '.join(ATTENTIONS)}.")]
KvDtype = Annotated[str | None, typer.Option(help=f"Of the KV cache alone: {', '.join(KV_DTYPES)}.")]
Speculate = Annotated[
    str | None, typer.Option(help="Guess tokens ahead and check them together: prompt-lookup, or a draft model.")
]
NumSpeculativeTokens = Annotated[int | None, typer.Option(help="So many at once, with --speculate. Default: 4.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy. Default: 1.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this total.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this times the likeliest.")]
MaxTokens = Annotated[int | None, typer.Option(help=f"At most so many. Default: {SamplingParams.max_tokens}.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Makes the output repeat. Default: random.")]


def load(model: str, **settings: Any) -> LLM:
    EngineConfig(model=model, **settings)  # complain before the slow import, not after
    from minipaged.llm import LLM

    return LLM(model, **settings)


def torchrun() -> bool:
    """Whether torchrun has started several processes, of which this is one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def sampling(**options: Any) -> SamplingParams:
    """SamplingParams of the options that were given. Without a seed, every run is another."""
    if options.get("seed") is None:
        import secrets

        options["seed"] = secrets.randbits(31)
    return SamplingParams(**given(**options))


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def fail(message: str) -> int:
    """One line on stderr; returns the exit code for it."""
    print(f"minipaged: {' '.join(message.split())}", file=sys.stderr)
    return 2
