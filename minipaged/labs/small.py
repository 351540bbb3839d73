"""The real engine on a real but small model, whose decoding attention a student's code computes.

Every call is compared with the engine's own kernel, and the engine goes on with what the student's returned.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.core.plan import StepPlan
from minipaged.errors import StepFailed
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.runner import ModelRunner
from minipaged.features.full_sampler import sample
from minipaged.kernels import reference
from minipaged.kernels.backend import TORCH, Kernels
from minipaged.labs import toy
from minipaged.labs.checking import Tape, Trace, Trial
from minipaged.labs.student import StudentError, Violation
from minipaged.models.llama import Llama, LlamaConfig

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Any]  # arguments and result of `paged_decode`

Prepare = Callable[[StepPlan], None]

MODEL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32,
}  # fmt: skip
BLOCK_SIZE, NUM_BLOCKS = 3, 12
TOLERANCE = 1e-3


class Runner(ModelRunner):
    """Tells ``prepare`` of every plan before it is executed."""

    def __init__(self, model: Any, kv_cache: KVCache, prepare: Prepare) -> None:
        super().__init__(model, kv_cache, torch.device("cpu"))
        self._prepare = prepare

    def execute(self, plan: StepPlan) -> Tensor:
        self._prepare(plan)
        return super().execute(plan)


def small_model(seed: int) -> Llama:
    """A Llama with random weights, large enough that what it says depends on all of its context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(LlamaConfig.from_config(MODEL, "LlamaForCausalLM"))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
            else:
                torch.nn.init.ones_(parameter)
    return model.requires_grad_(False)


def small_engine(model: Llama, kernels: Kernels = TORCH, prepare: Prepare = lambda plan: None) -> Engine:
    config = EngineConfig(
        model="small", num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=32, enable_prefix_caching=False,
        max_num_seqs=4, max_num_batched_tokens=8,
    )  # fmt: skip
    heads = (MODEL["num_key_value_heads"], MODEL["head_dim"])
    cache = KVCache(
        MODEL["num_hidden_layers"], NUM_BLOCKS, BLOCK_SIZE, *heads, torch.float32, torch.device("cpu"), kernels
    )
    for tensor in cache.k + cache.v:  # as an earlier owner may leave it
        tensor.fill_(torch.nan)
    return assemble(config, Runner(model, cache, prepare), sample, vocab_size=MODEL["vocab_size"])


def checked(attend: Attend, name: str, store: Callable[..., Tensor] = reference.rope_store) -> Kernels:
    """The engine's kernels with ``attend`` for decoding, whose results are compared at once, and ``store``."""

    def compared(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float,
        sliding_window: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        arguments = (q, k_cache, v_cache, block_tables, context_lens, scale)
        right = reference.paged_decode(*arguments, sliding_window, k_scale, v_scale)
        got = attend(*arguments)
        if not isinstance(got, Tensor) or got.shape != right.shape or not got.is_floating_point():
            raise Violation(f"in the engine, {name} gave no float tensor of shape {list(right.shape)}", "shape")
        off = (got.float() - right).abs().amax(dim=(1, 2))
        for b, length in enumerate(context_lens.tolist()):
            if not off[b].item() <= TOLERANCE:
                where = f"sequence {b} of the batch ({length} tokens in blocks {block_tables[b].tolist()})"
                wrong = f"wrong by {off[b].item():.3g}"
                raise Violation(f"in the engine, the result of {name} for {where} is {wrong}", "result")
        return got.to(right.dtype)

    class CheckedKernels(Kernels):
        paged_decode = staticmethod(compared)
        rope_store = staticmethod(store)

    return CheckedKernels()


def greedy(engine: Engine, requests: Trace) -> dict[str, list[list[int]]]:
    """The most likely continuations. ``requests``: (prompt, number of tokens). Raises what the student's code broke."""
    for number, (prompt, count) in enumerate(requests):
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        engine.add_request(f"request-{number}", prompt, params)
    try:
        return toy.run(engine)
    except StepFailed as failed:
        if isinstance(failed.__cause__, Violation | StudentError):
            raise failed.__cause__ from None
        raise


def search(trial: Trial, kernels_of: Callable[[Tape], tuple[Kernels, Prepare]], shapes: list[tuple[int, int]]) -> None:
    """Lets the engine serve requests of these lengths (prompt, output) with the student's kernels: the same text."""
    model = small_model(trial.random.randrange(1 << 40))

    def run(trace: Trace, tape: Tape) -> None:
        for number, (prompt, count) in enumerate(trace):
            tape.say(f"request-{number}: a prompt of {len(prompt)} tokens, {count} tokens of output")
        engine = small_engine(model, *kernels_of(tape))
        tape.record(engine.started_event())
        engine.events.subscribe(tape.record)
        if same(engine, trace):
            return
        # Two tokens may be equally likely to the last digit, and rounding decides. That does not happen twice.
        others = [([(token + 1) % MODEL["vocab_size"] for token in prompt], count) for prompt, count in trace]
        if not same(small_engine(model, *kernels_of(Tape())), others):
            raise Violation("the engine's text is another than with its own kernel", "text")

    def same(engine: Engine, requests: Trace) -> bool:
        return greedy(engine, requests) == greedy(small_engine(model), requests)

    trial.search([_requests(trial.random, shapes)], run)


def _requests(random: Random, shapes: list[tuple[int, int]]) -> Trace:
    return [([random.randrange(MODEL["vocab_size"]) for _ in range(length)], count) for length, count in shapes]
