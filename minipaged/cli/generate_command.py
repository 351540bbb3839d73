"""``minipaged generate``: continues a prompt, in one process or in several that torchrun started."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from minipaged.cli.options import (
    DEFAULT,
    Attention,
    Device,
    Dtype,
    KvDtype,
    KvMemory,
    MaxModelLen,
    MaxNumSeqs,
    MaxTokens,
    Memory,
    MinP,
    Model,
    NumBlocks,
    NumSpeculativeTokens,
    RepetitionPenalty,
    Seed,
    Speculate,
    Stop,
    Temperature,
    TopK,
    TopP,
    given,
    load,
    own_sampling,
    pool,
    sampling,
    tell_pool,
    torchrun,
)  # fmt: skip
from minipaged.cli.screen import shown

if TYPE_CHECKING:
    from minipaged.llm import LLM
    from minipaged.outputs import Delta


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    n: Annotated[int, typer.Option("-n", help="Continuations to sample; they share the prompt's blocks.")] = 1,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    seed: Seed = None,
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    memory: Memory = None,
    attention: Attention = None,
    kv_dtype: KvDtype = None,
    num_blocks: NumBlocks = None,
    kv_memory: KvMemory = None,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a text. With torchrun, several processes share the model (tensor parallelism)."""
    options = sampling(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        logprobs=0 if as_json else None,  # of sampled tokens only, for cumulative_logprob
    )
    settings = given(
        device=device, dtype=dtype, memory=memory, attention=attention, kv_dtype=kv_dtype, speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    )  # fmt: skip
    # There is one request: by default the pool is as large as its sequences can make use of.
    wanted = min(n, DEFAULT.max_num_batched_tokens)
    settings |= {"max_num_seqs": wanted} | pool(num_blocks, kv_memory, max_num_seqs, max_model_len)
    if torchrun():
        from minipaged.features.tensor_parallel.launch import run

        run(lambda llm: _answer(tell_pool(llm), prompt, options, as_json), model, **settings)
    else:
        _answer(load(model, **settings), prompt, options, as_json)


def _answer(llm: LLM, prompt: str, options: dict[str, Any], as_json: bool) -> None:
    params, line = own_sampling(llm, options)
    print(line, file=sys.stderr)
    if params.n == 1 and not as_json:
        _print_stream(llm.stream(prompt, params))
        return
    outputs = llm.generate(prompt, params)[0].outputs
    if as_json:
        keys = ("index", "text", "token_ids", "finish_reason", "cumulative_logprob")
        samples = [{key: getattr(output, key) for key in keys} for output in outputs]
        answer = {"model": llm.engine.config.model, "prompt": prompt, "outputs": samples}
        print(_json(answer))
        return
    console = Console()
    for output in outputs:
        console.rule(f"{output.index + 1} of {params.n}, finished by {output.finish_reason}")
        print(shown(output.text))


def _json(answer: Any) -> str:
    """One line of JSON without control characters: json escapes most of them, but not DEL and the C1 controls."""
    text = json.dumps(answer, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _print_stream(deltas: Iterator[Delta]) -> str:
    """Prints text while it is generated and returns all of it."""
    pieces = []
    try:
        for delta in deltas:
            print(shown(delta.text), end="", flush=True)
            pieces.append(delta.text)
    finally:
        print()  # also after Ctrl-C, so that the shell's prompt starts on a new line
    return "".join(pieces)
