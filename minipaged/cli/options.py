"""Options that several commands share, and functions that turn them into settings."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipaged.cli.screen import shown
from minipaged.config import (
    ATTENTIONS,
    DEVICES,
    DTYPES,
    EVICTIONS,
    KV_DTYPES,
    MANAGERS,
    EngineConfig,
    SamplingParams,
    num_bytes,
)
from minipaged.errors import InvalidConfig
from minipaged.models.sampling_defaults import describe, stated

if TYPE_CHECKING:
    from minipaged.llm import LLM

DEFAULT = EngineConfig()

# None means not given: EngineConfig and SamplingParams have the defaults and check the limits.
MODEL_HELP = "'tiny' (embedded), a directory (Hugging Face), a GGUF file, or a hub id."
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
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
NumBlocks = Annotated[int | None, typer.Option(help="KV blocks in the pool. Default: as many as fit and are of use.")]
KvMemory = Annotated[
    str | None, typer.Option(help="The pool's size in bytes instead, with a unit if you like: 512MiB, 2GiB, 2GB.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Most sequences in the running batch.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Most tokens in a sequence, prompt included.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy. Default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Divides the logits of tokens that occurred; above 1 discourages them.")
]
MaxTokens = Annotated[int | None, typer.Option(help=f"Most tokens to generate. Default: {SamplingParams.max_tokens}.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Makes the output repeat, on this machine. Default: random.")]


def load(model: str, **settings: Any) -> LLM:
    """Makes the `LLM`, and tells on stderr how large its pool is."""
    EngineConfig(model=model, **settings)  # reject wrong settings before the slow import
    from minipaged.llm import LLM

    return tell_pool(LLM(model, **settings))


def pool(
    num_blocks: int | None, kv_memory: str | None, max_num_seqs: int | None, max_model_len: int | None
) -> dict[str, Any]:
    """The settings of the pool's size that were given. Raises `InvalidConfig` with the options' names."""
    if num_blocks is not None and kv_memory is not None:
        raise InvalidConfig("--kv-memory and --num-blocks exclude each other; leave one of them out")
    size = None if kv_memory is None else num_bytes(kv_memory, "--kv-memory")
    return given(num_blocks=num_blocks, kv_memory=size, max_num_seqs=max_num_seqs, max_model_len=max_model_len)


def tell_pool(llm: LLM) -> LLM:
    """Prints the size of the pool on stderr, and how much of it is in memory now. Returns ``llm``."""
    from minipaged.build import kv_tensors
    from minipaged.execution.lazy_memory import committed

    tensors, blocks, size = kv_tensors(llm.engine), llm.engine.num_blocks, llm.engine.config.block_size or 0
    most, now = sum(tensor.nbytes for tensor in tensors) / 2**20, committed(tensors) / 2**20
    swap = " with its swap space" if llm.engine.config.preemption == "swap" else ""
    print(
        f"KV cache: {blocks:,} blocks of {size} tokens, {blocks * size:,} tokens in all; "
        f"it takes {most:,.0f} MiB at most{swap}, {now:,.0f} MiB of them now",
        file=sys.stderr,
    )
    return llm


def torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def sampling(**options: Any) -> dict[str, Any]:
    """The options that were given, checked before the model is loaded. Raises `InvalidRequest`."""
    SamplingParams(**given(**options))
    return given(**options)


def own_sampling(llm: LLM, options: dict[str, Any], **defaults: Any) -> tuple[SamplingParams, str]:
    """The model's own sampling parameters, updated with the user's ``options``, and a line that shows them.

    ``defaults`` apply if the model states no sampling parameter. The seed is random unless given.
    """
    import secrets

    own = {"seed": secrets.randbits(31)} | ({} if stated(llm.generation_config) else defaults)
    params = replace(llm.default_params, **(own | options))
    return params, describe(params, llm.generation_config, options)


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def fail(message: str) -> int:
    """Prints one line on stderr; returns exit code 2."""
    print(f"minipaged: {shown(' '.join(message.split()))}", file=sys.stderr)
    return 2
