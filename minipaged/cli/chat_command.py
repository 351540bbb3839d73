"""``minipaged chat``: a conversation in the terminal, with the embedded engine or any OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from minipaged.cli.chat_models import Answerer, LocalModel, RemoteModel
from minipaged.cli.chat_session import Chat
from minipaged.cli.keyboard import messages
from minipaged.cli.options import (
    DEFAULT,
    MODEL_HELP,
    Attention,
    Device,
    Dtype,
    KvDtype,
    KvMemory,
    MaxModelLen,
    MaxNumSeqs,
    Memory,
    MinP,
    NumBlocks,
    NumSpeculativeTokens,
    RepetitionPenalty,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    given,
    load,
    pool,
    sampling,
)  # fmt: skip
from minipaged.errors import InvalidRequest


def chat(
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    url: Annotated[str | None, typer.Option(help="Use this server instead, e.g. http://127.0.0.1:8000/v1.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's key.", show_envvar=True)
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer. Default: no limit.")] = None,
    seed: Seed = None,
    no_think: Annotated[bool, typer.Option("--no-think", help="Tell the model not to think first (Qwen3).")] = False,
    model: Annotated[
        str | None, typer.Option(help=MODEL_HELP + " With --url: the server's name for it.", show_default=DEFAULT.model)
    ] = None,
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
) -> None:
    """Talk with a chat model, here or on an OpenAI-compatible server."""
    options = given(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    settings = given(
        memory=memory, attention=attention, kv_dtype=kv_dtype, speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    ) | pool(num_blocks, kv_memory, max_num_seqs, max_model_len)  # fmt: skip
    template = {"enable_thinking": False} if no_think else {}
    answerer: Answerer
    if url is None:
        sampling(**options)  # rejects wrong values before the model is loaded
        settings = {"max_num_seqs": 1} | settings  # there is one user
        answerer = LocalModel(load(model or DEFAULT.model, device=device, dtype=dtype, **settings))
        answerer.check(template)  # raises now if the model cannot chat
    elif settings or (device, dtype) != (DEFAULT.device, DEFAULT.dtype):
        what = "device, dtype, memory, attention, kv-dtype, speculate and the pool's size"
        raise InvalidRequest(f"{what} are the server's business; leave them out with --url")
    else:
        answerer = RemoteModel(url, api_key, model)
    if system is not None:
        system = system.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are not UTF-8
    Chat(answerer, system, options, template).run(messages())
