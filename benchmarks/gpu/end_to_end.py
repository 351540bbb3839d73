"""End-to-end throughput in tokens/s: Llama shapes with random weights, against transformers and the roofline.

All generate the same number of greedy tokens from the same prompts, with the same weights: transformers' parameters are
views of the engine's. The time includes prefill; prefix caches are off on both sides, because every run repeats the
same prompts. All warm up first, so that kernels are compiled and graphs captured.

The roofline is the limit by memory bandwidth: every step reads all weights, and the KV of all tokens so far.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device_timing import copy_bandwidth, free_memory, spread
from benchmarks.gpu.job import Job

BATCHES, NUM_PROMPT, NUM_TOKENS = (1, 32, 256), 128, 128
MAX_RUNS = 3
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
          "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "bos_token_id": None,
          "eos_token_id": None}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    # Shapes of Llama 3.2 1B and Llama 3.1 8B.
    "1B": COMMON | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                    "tie_word_embeddings": True},
    "8B": COMMON | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                    "tie_word_embeddings": False},
}  # fmt: skip
SMALL = {"small": COMMON | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
                            "tie_word_embeddings": True}}  # fmt: skip

Generate = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, number of tokens) → the tokens of each


def measure(job: Job) -> None:
    """Tokens per second for each shape and batch size."""
    shapes, batches = (SMALL, (1, 3)) if job.smoke else (SHAPES, BATCHES)
    bandwidth = copy_bandwidth(job.device, job.smoke)
    job.note(copy_bytes_per_second=bandwidth, num_prompt=_sizes(job)[0], num_tokens=_sizes(job)[1])
    cells = [(name, batch) for name in shapes for batch in batches]
    for name in shapes:
        if 2.2 * _weight_bytes(shapes[name]) > free_memory(job.device):  # transformers first allocates its own
            cells = [cell for cell in cells if cell[0] != name]
            job.row("cells", model=name, skipped="its weights do not fit into the memory")
            continue
        ours = random_model(shapes[name], job.device)
        theirs = _as_transformers(ours, shapes[name])
        for batch in batches:
            seconds = (job.left() - 5) / len(cells)  # an equal share of the remaining time
            del cells[0]
            if seconds < (0.5 if job.smoke else 8):
                job.row("cells", model=name, batch=batch, skipped="the section's time is over")
                continue
            _cell(job, name, ours, theirs, batch, bandwidth["median"], seconds)
        del ours, theirs
        _collect()


def _cell(job: Job, name: str, ours: Any, theirs: Any, batch: int, bandwidth: float, seconds: float) -> None:
    num_prompt, num_tokens = _sizes(job)
    torch.manual_seed(batch)
    prompts = torch.randint(3, ours.spec.vocab_size, (batch, num_prompt)).tolist()
    ways = {
        "minipaged": _engine(ours, batch),
        "generate": _generate(theirs),
        "continuous_batching": _batching(theirs, batch, num_prompt, num_tokens),
    }
    found: dict[str, Any] = {}
    first: dict[str, list[list[int]]] = {}
    for way, context in ways.items():
        try:
            found[way], first[way] = _timed(context, prompts, num_tokens, job.device, seconds / len(ways))
        except Exception as error:
            found[way] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
            if way == "minipaged":
                job.fail(f"{name}, batch {batch}: {found[way]['error']}")
        _collect()
    for way, outputs in first.items():
        if [len(tokens) for tokens in outputs] != [num_tokens] * batch:
            found[way] = {"error": f"generated {sum(map(len, outputs))} tokens instead of {batch * num_tokens}"}
            job.fail(f"{name}, batch {batch}, {way}: {found[way]['error']}")
    ideal = roofline(ours, batch, num_prompt, num_tokens, bandwidth)
    rates = {way: result.get("median") for way, result in found.items()}
    job.row(
        "cells", model=name, batch=batch, roofline=ideal,
        fraction_of_roofline=_ratio(rates["minipaged"], ideal),
        times_generate=_ratio(rates["minipaged"], rates["generate"]),
        times_continuous_batching=_ratio(rates["minipaged"], rates["continuous_batching"]),
        same_first_tokens=_agreement(first), **{f"{way}_tokens_per_second": found[way] for way in ways},
    )  # fmt: skip


def _sizes(job: Job) -> tuple[int, int]:
    return (6, 5) if job.smoke else (NUM_PROMPT, NUM_TOKENS)


def _timed(
    way: AbstractContextManager[Generate],
    prompts: list[list[int]],
    num_tokens: int,
    device: torch.device,
    seconds: float,
) -> tuple[dict[str, float], list[list[int]]]:
    """Tokens per second by wall-clock time, which includes the host's work, and the tokens of the first run."""
    started = time.monotonic()
    outputs, rates = [], []
    with way as generate:
        # Warm-up, long enough for batches to shrink: sequences whose prefill came in a later step end later.
        generate(prompts, min(num_tokens, 10))
        while len(rates) < MAX_RUNS:
            begin = time.perf_counter()
            tokens = generate(prompts, num_tokens)
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - begin
            rates.append(sum(map(len, tokens)) / elapsed)
            outputs = outputs or tokens
            if time.monotonic() - started + elapsed > seconds:
                break
    return spread(rates), outputs


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _agreement(outputs: dict[str, list[list[int]]]) -> float | None:
    """The fraction of sequences with the same first token in all engines; in bfloat16, near ties may differ."""
    firsts = zip(*([tokens[:1] for tokens in sequences] for sequences in outputs.values()), strict=False)
    same = [all(token == tokens[0] for token in tokens) for tokens in firsts]
    return sum(same) / len(same) if same else None


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the roofline -------------------------------------------------------------------------------------------


def roofline(loaded: Any, batch: int, num_prompt: int, num_tokens: int, bandwidth: float) -> float:
    """The memory-bound limit in tokens/s: only reading weights and KV takes time. ``bandwidth``: bytes per second.

    The first step is the prefill of all prompts; each other step decodes one token of each sequence.
    """
    spec, model = loaded.spec, loaded.model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tied:
        weights -= model.embed_tokens.weight.nbytes  # a step reads only one row of it per token
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * loaded.dtype.itemsize
    contexts = sum(range(num_prompt + 1, num_prompt + num_tokens))
    return batch * num_tokens / ((num_tokens * weights + batch * contexts * per_token) / bandwidth)


# --- engines ------------------------------------------------------------------------------------------------


def _weight_bytes(shape: dict[str, Any]) -> int:
    from minipaged.models.llama import Llama, LlamaConfig

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_config(shape, "LlamaForCausalLM"))
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def random_model(shape: dict[str, Any], device: torch.device) -> Any:
    """A `LoadedModel` with random weights, made in memory: bfloat16 on a GPU, float32 on a CPU."""
    from minipaged.models import loader
    from minipaged.models.llama import Llama, LlamaConfig

    config = LlamaConfig.from_config(shape, "LlamaForCausalLM")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Llama(config)
    loader._allocate(model, device, dtype)  # like load_model, but without a checkpoint
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    spec = loader._spec("LlamaForCausalLM", config, frozenset())
    return loader.LoadedModel(model.eval(), spec, None, Path("random weights"), device, dtype)


def _as_transformers(loaded: Any, shape: dict[str, Any]) -> Any:
    """transformers' model, sharing the memory of our weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = LlamaConfig(**shape)
    with torch.device(loaded.device):
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype, attn_implementation="sdpa").eval()
    views = dict(loaded.model.checkpoint_views())
    for name, parameter in model.named_parameters():
        parameter.data = views.pop(name.removeprefix("model."))
    assert not views, f"transformers knows no {min(views)}"
    _collect()
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def _engine(loaded: Any, batch: int) -> Iterator[Generate]:
    from minipaged import EngineConfig, SamplingParams
    from minipaged.build import build_engine

    length = NUM_PROMPT + NUM_TOKENS
    config = EngineConfig(
        device=loaded.device.type, max_num_seqs=batch, max_num_batched_tokens=8192, max_model_len=length,
        num_blocks=batch * -(-length // 16), enable_prefix_caching=False,
    )  # fmt: skip
    engine = build_engine(config, loaded)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, params)
        tokens = {}
        while engine.has_unfinished():
            tokens |= {out.request_id: out.outputs[0].token_ids for out in engine.step() if out.finished}
        return [tokens[str(i)] for i in range(len(prompts))]

    yield generate


@contextmanager
def _generate(model: Any) -> Iterator[Generate]:
    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        out: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens,
                                     do_sample=False, pad_token_id=0)  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    yield generate


@contextmanager
def _batching(model: Any, batch: int, num_prompt: int, num_tokens: int) -> Iterator[Generate]:
    """transformers' continuous batching: its manager, started and warmed up once, with its own workload hints."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Half of the GPU's memory is far more than the requests need, and leaves room for the weights.
    limits = {"max_memory_percent": 0.5} if model.device.type == "cuda" else {"num_blocks": 8, "max_batch_tokens": 64}
    config = ContinuousBatchingConfig(allow_block_sharing=False, **limits)
    hints = WorkloadHints(max_prompt_length=num_prompt, max_generated_length=num_tokens, num_requests=batch)
    attention = model.config._attn_implementation
    with model.continuous_batching_context_manager(
        settings, continuous_batching_config=config, workload_hints=hints, timeout=5
    ) as manager:

        def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
            ids = manager.add_requests(prompts, max_new_tokens=num_tokens)
            tokens: dict[str, list[int]] = {}
            while len(tokens) < len(ids):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    tokens[output.request_id] = output.generated_tokens
                elif output is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has stopped")
            return [tokens[request_id] for request_id in ids]

        yield generate
    model.set_attn_implementation(attention)
