"""Options that several commands share, and functions that turn them into settings."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipaged.config import ATTENTIONS, DEVICES, DTYPES, EVICTIONS, KV_DTYPES, MANAGERS, EngineConfig, SamplingParams

if TYPE_CHECKING:
    from minipaged.llm import LLM

DEFAULT = EngineConfig()

# None means not given: EngineConfig and SamplingParams have the defaults and check the limits.
Model = Annotated[str, typer.Option(help="'tiny' (embedded), a directory (Hugging Face), or a hub id.")]
Device = Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")]
Dtype = Annotated[str, typer.Option(help=f"Data type of weights and KV cache: {', '.join(DTYPES)}.")]
Memory = Annotated[str | None, typer.Option(help=f"Memory manager: {', '.join(MANAGERS)}.")]
Eviction = Annotated[str | None, typer.Option(help=f"Eviction policy of the prefix cache: {', '.join(EVICTIONS)}.")]
Attention = Annotated[str | None, typer.Option(help=f"Attention backend: {', '.join(ATTENTIONS)}.")]
KvDtype = Annotated[str | None, typer.Option(help=f"Data type of the KV cache only: {', '.join(KV_DTYPES)}.")]
Speculate = Annotated[
    str | None, typer.Option(help="Speculative decoding: prompt-lookup, or the name of a draft model.")
]
NumSpeculativeTokens = Annotated[int | None, typer.Option(help="Draft tokens per step, with --speculate. Default: 4.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy. Default: 1.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
MaxTokens = Annotated[int | None, typer.Option(help=f"Most tokens to generate. Default: {SamplingParams.max_tokens}.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Makes the output repeat. Default: random.")]


def load(model: str, **settings: Any) -> LLM:
    EngineConfig(model=model, **settings)  # reject wrong settings before the slow import
    from minipaged.llm import LLM

    return LLM(model, **settings)


def torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def sampling(**options: Any) -> SamplingParams:
    """SamplingParams from the options that were given; a random seed if none was."""
    if options.get("seed") is None:
        import secrets

        options["seed"] = secrets.randbits(31)
    return SamplingParams(**given(**options))


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def fail(message: str) -> int:
    """Prints one line on stderr; returns exit code 2."""
    print(f"minipaged: {' '.join(message.split())}", file=sys.stderr)
    return 2
