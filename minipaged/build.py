"""Builds an engine from its settings: the one file that knows all features.

`assemble` builds an engine around any runner, without torch: the scheduler's side of each feature. `build_engine`
also builds the runner for a loaded model: its KV cache, and the code that computes on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minipaged.config import EngineConfig
from minipaged.core.block_table import BlockTables
from minipaged.core.engine import Engine, Wings
from minipaged.core.prefix_cache import EvictionPolicy
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import FCFS, MemoryManager, Stage
from minipaged.errors import InvalidConfig
from minipaged.events import EventLog
from minipaged.events.waste import AHEAD
from minipaged.features.batchllm.groups import BatchItem, add_batch
from minipaged.features.beam_search import decoding_of
from minipaged.features.contiguous.contiguous_tables import ContiguousTables
from minipaged.features.eviction.policies import BY_NAME, Closing
from minipaged.features.eviction.prediction import closing_words
from minipaged.features.eviction.predictions import Predictions
from minipaged.features.fork_by_hand import fork
from minipaged.features.speculative.drafts import make_speculation
from minipaged.features.static_batching import StaticBatching
from minipaged.features.swap.swap_stage import Swap
from minipaged.features.vattention.virtual_tables import SlotMapping, VirtualTables

if TYPE_CHECKING:
    import torch

    from minipaged.execution.kv_cache import KVCache
    from minipaged.kernels.backend import Kernels
    from minipaged.models.loader import LoadedModel

log = logging.getLogger(__name__)

__all__ = ["BatchItem", "assemble", "build_engine", "kv_tensors", "load", "make_manager", "rebuild"]


# --- the scheduler's side -----------------------------------------------------------------------------------------


def assemble(
    config: EngineConfig,
    runner: Any,
    sampler: Callable[..., Any],
    *,
    tokenizer: Any = None,
    make_memory: Callable[[Any, EventLog], MemoryManager] | None = None,
    make_scheduler: Callable[..., Scheduler] = Scheduler,
    **settings: Any,
) -> Engine:
    """Builds an engine with all features that ``config`` enables, around a runner and a sampler.

    ``settings`` are further keywords of `Engine`. ``config.num_blocks`` and ``max_model_len`` must be numbers.
    """
    closing = closing_words(tokenizer) if tokenizer is not None else None
    engine = Engine(
        config,
        runner,
        sampler,
        tokenizer=tokenizer,
        make_text=_text_maker(tokenizer),
        make_memory=make_memory or partial(make_manager, closing=closing),
        make_scheduler=make_scheduler,
        wings=Wings(
            config=EngineConfig,
            admission=StaticBatching if config.batching == "static" else config.admission_policy or FCFS,
            stages=partial(make_stages, config),
            decoding=decoding_of,
            add_batch=add_batch,
            fork=fork,
        ),
        **settings,
    )
    for subscriber in config.subscribers:
        engine.events.subscribe(subscriber)
    return engine


def rebuild(engine: Engine) -> Engine:
    """Builds an engine like this one before its first request: same model and KV tensors, new bookkeeping."""
    return assemble(
        engine.config,
        engine.runner,
        engine.sampler,
        tokenizer=engine.tokenizer,
        make_memory=engine.make_memory,
        make_scheduler=engine.make_scheduler,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        bytes_per_block=engine.bytes_per_block,
    )


def kv_tensors(engine: Engine) -> list[torch.Tensor]:
    """All tensors that hold an engine's KV: those of its pool, of a draft model's pool, and of the swap space."""
    found, runners = [], [engine.runner]
    while runners:
        parts = vars(runners.pop())
        runners += [parts[name] for name in ("inner", "draft") if name in parts]
        stores = [parts[name].stores for name in ("kv_cache", "space") if name in parts]
        found += [tensor for lists in stores for tensors in lists for tensor in tensors]
    return found


def make_manager(config: EngineConfig, events: EventLog, closing: Closing | None = None) -> MemoryManager:
    """The memory manager that ``config.memory`` names. ``num_blocks`` and ``max_model_len`` must be numbers.

    ``closing`` tells from a prompt's tokens whether the user has said goodbye; eviction by prediction uses it.
    """
    num_blocks, block_size, max_model_len = config.num_blocks, config.block_size, config.max_model_len
    assert num_blocks is not None and block_size is not None and max_model_len is not None
    if config.memory in AHEAD:
        return ContiguousTables(config.memory, num_blocks, block_size, max_model_len, events)
    make_policy: Callable[[], EvictionPolicy] = config.eviction_policy or partial(
        BY_NAME[config.eviction or "lru"], config.seed, closing
    )
    policy = make_policy() if config.caches_prefixes else None
    paged = (num_blocks, block_size, events, config.caches_prefixes, policy)
    if config.memory == "vattention":
        mapping = config.mapping or "async"
        return VirtualTables(*paged, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len, mapping=mapping)
    return BlockTables(*paged)


def make_stages(config: EngineConfig) -> list[Stage]:
    """The stages that ``config`` enables, in the order in which the scheduler calls them."""
    stages: list[Stage] = []
    if config.preemption == "swap":
        stages.append(Swap(config.swap_space(config.num_blocks or 0)))
    if config.eviction is not None or config.eviction_policy is not None:
        stages.append(Predictions())
    if config.speculate is not None:
        stages.append(make_speculation(config))
    stages += [make() for make in config.stages]
    if config.memory == "vattention":
        stages.append(SlotMapping())  # last: it maps the blocks that the other stages added to the plan
    return stages


def _text_maker(tokenizer: Any) -> Callable[..., Any] | None:
    if tokenizer is None:
        return None
    from minipaged.text.stream import TextStream  # imported only with a tokenizer: an engine may have none

    return partial(TextStream, tokenizer)


# --- the runner's side --------------------------------------------------------------------------------------------


def load(config: EngineConfig, shard: Any = None) -> LoadedModel:
    """Loads the model that ``config`` names, or one rank's ``shard`` of it.

    Raises `InvalidConfig`, before it loads any weights, for settings that this machine cannot run, and `ModelError`.
    """
    from minipaged.features.cuda_graphs import use_graphs
    from minipaged.features.tensor_parallel import ranks
    from minipaged.features.vattention.virtual_memory import page_size
    from minipaged.kernels.backend import choose
    from minipaged.models.loader import device_of, load_model

    def load() -> LoadedModel:
        device = device_of(config.device)
        use_graphs(config, choose(config.attention, device)[0], device)
        if config.memory == "vattention":
            page_size(device)
        if shard is not None:
            ranks.check(config, device)
        return load_model(config.model, config.device, config.dtype, shard, config.model_families)

    return load() if shard is None else ranks.on_all_ranks(load)


def build_engine(config: EngineConfig, loaded: LoadedModel, draft: LoadedModel | None = None, **parts: Any) -> Engine:
    """Builds an engine for a loaded model: resolves the settings that depend on model and machine, makes the KV cache.

    ``parts``: keywords of `assemble`. Raises `InvalidConfig` for settings that the model or the machine does not allow.
    """
    from minipaged.execution.pool_size import blocks_that_fit
    from minipaged.features.full_sampler import FullSampler
    from minipaged.features.tensor_parallel.ranks import gather, neighbours, on_all_ranks

    spec, shard = loaded.spec, loaded.shard
    max_model_len = config.max_model_len or spec.max_model_len
    if max_model_len > spec.max_model_len:
        raise InvalidConfig(f"max_model_len is {max_model_len}, but {config.model} supports {spec.max_model_len}")
    config = replace(config, max_model_len=max_model_len)
    for model in filter(None, (loaded, draft)):
        config = _without_fixed_keys(config, model.spec.dynamic_after)
    config = replace(config, block_size=_block_size(config, loaded))
    bytes_per_block = sum(_bytes_per_block(config, model) for model in (loaded, draft) if model is not None)
    fit = partial(
        blocks_that_fit,
        bytes_per_block * (neighbours(loaded.device) if shard is not None else 1),
        loaded.device,
        wanted=config.num_blocks,
        useful=config.max_num_seqs * -(-max_model_len // (config.block_size or 1)),
        swap_blocks=config.swap_blocks if config.preemption == "swap" else 0,
        kv_memory=None if config.kv_memory is None else int(config.kv_memory),
    )
    num_blocks = fit() if shard is None else min(gather(on_all_ranks(fit)))  # block tables are the same on all ranks
    config = replace(config, num_blocks=num_blocks, kv_memory=None)
    return assemble(
        config,
        _runner(config, loaded, draft),
        FullSampler(spec.vocab_size, spec.eos_token_ids),
        tokenizer=loaded.tokenizer,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        bytes_per_block=bytes_per_block,
        **parts,
    )


def _without_fixed_keys(config: EngineConfig, after: int | None) -> EngineConfig:
    """The settings for dynamic RoPE: beyond ``after`` tokens, prompts of different lengths cannot share blocks.

    Raises `InvalidConfig` if the user asked for what shares them, or for CUDA graphs, which know no prompts.
    """
    if after is None or (config.max_model_len or 0) <= after:
        return config
    for name in ("enable_prefix_caching", "cuda_graphs"):
        if getattr(config, name):
            raise InvalidConfig(
                f"{name}=True and dynamic RoPE exclude each other beyond {after} tokens, from where keys depend on the "
                f"length of their prompt; set max_model_len to {after} or less, or leave {name} out"
            )
    if config.caches_prefixes:
        log.warning("dynamic RoPE: the prefix cache is off; max_model_len=%d or less would allow it", after)
    return replace(config, enable_prefix_caching=False, cuda_graphs=False)


def _runner(config: EngineConfig, loaded: LoadedModel, draft: LoadedModel | None) -> Any:
    """The nested runners, outermost first: tensor parallelism, drafts, mapping, swapping, the model."""
    from minipaged.features.speculative.draft_runner import DraftRunner
    from minipaged.features.tensor_parallel.ranks import LeadingRunner

    runner = _model_runner(config, loaded)
    if draft is not None:
        runner = DraftRunner(_model_runner(config, draft), runner)
    if loaded.shard is not None and loaded.shard.rank == 0:
        runner = LeadingRunner(runner)
    return runner


def _model_runner(config: EngineConfig, loaded: LoadedModel) -> Any:
    """The runner of one model, wrapped for swapping and mapping if they are enabled."""
    from minipaged.execution.runner import ModelRunner
    from minipaged.features.cuda_graphs import use_graphs
    from minipaged.features.swap.swap_runner import SwapRunner
    from minipaged.features.vattention.virtual_memory import MappingRunner
    from minipaged.kernels.backend import kernels_for

    virtual = config.memory == "vattention"
    # vAttention makes KV contiguous, so torch's own attention and the other torch functions work on it.
    kernels = kernels_for("torch" if virtual else config.attention, loaded.device)
    graphs = loaded.shard is None and use_graphs(config, kernels.name, loaded.device)
    kv_cache = _virtual_kv_cache(config, loaded) if virtual else _kv_cache(config, loaded, kernels, graphs)
    runner: Any = ModelRunner(loaded.model, kv_cache, loaded.device, _forward(config, loaded, kv_cache, graphs))
    if config.preemption == "swap":
        runner = SwapRunner(runner, config.swap_space(config.num_blocks or 0))
    return MappingRunner(runner) if virtual else runner


def _forward(config: EngineConfig, loaded: LoadedModel, kv_cache: KVCache, graphs: bool) -> Any:
    """What computes a step in place of the model: CUDA graphs on a GPU, C++ on a CPU; ``None``: the model itself."""
    from minipaged.features.cpu_step import NativeForward
    from minipaged.features.cuda_graphs import DecodeGraphs

    if graphs:
        assert config.num_blocks and config.max_model_len and config.block_size
        return DecodeGraphs(
            loaded.model,
            kv_cache,
            loaded.device,
            max_num_seqs=config.max_num_seqs,
            max_blocks=-(-config.max_model_len // config.block_size),
            scratch_block=config.num_blocks,  # padding rows write their KV to the cache's last block
        )
    lacking = "it has no all-reduce" if loaded.shard else NativeForward.unserved(loaded.model, kv_cache)
    if not lacking:
        return NativeForward(loaded.model, kv_cache)
    if kv_cache.kernels.name == "native":
        log.info("steps run in torch (minipaged/models/), not in one C++ call: %s", lacking)
    return None


def _kv_cache(config: EngineConfig, loaded: LoadedModel, kernels: Kernels, graphs: bool) -> KVCache:
    """The KV cache of one model. With CUDA graphs it has one extra block, which is in no block table."""
    from minipaged.execution.kv_cache import KVCache
    from minipaged.features.kv_int8 import Int8KVCache

    assert config.num_blocks and config.block_size
    spec = loaded.spec
    shape = (spec.num_layers, config.num_blocks + int(graphs), config.block_size, spec.num_kv_heads, spec.head_dim)
    if config.kv_dtype == "int8":
        return Int8KVCache(*shape, loaded.device, kernels)
    return KVCache(*shape, loaded.dtype, loaded.device, kernels)


def _virtual_kv_cache(config: EngineConfig, loaded: LoadedModel) -> KVCache:
    from minipaged.features.vattention.virtual_memory import VirtualKVCache

    assert config.num_blocks and config.block_size and config.max_model_len
    slots = {"max_num_seqs": config.max_num_seqs, "max_model_len": config.max_model_len}
    return VirtualKVCache(_layout(config, loaded), config.num_blocks, config.block_size, loaded.device, **slots)


def _layout(config: EngineConfig, loaded: LoadedModel) -> Any:
    from minipaged.features.vattention.virtual_memory import Layout

    spec = loaded.spec
    return Layout(spec.num_layers, spec.num_kv_heads, spec.head_dim, loaded.dtype, config.tensor_slicing)


def _block_size(config: EngineConfig, loaded: LoadedModel) -> int:
    """Tokens per block: as configured, or enough to fill whole pages under vAttention."""
    if config.memory == "vattention":
        sizes = (config.max_num_seqs, config.max_model_len, loaded.device)
        return _layout(config, loaded).block_size(config.block_size, *sizes)
    assert config.block_size is not None
    return config.block_size


def _bytes_per_block(config: EngineConfig, loaded: LoadedModel) -> int:
    from minipaged.execution.kv_cache import KVCache
    from minipaged.features.kv_int8 import Int8KVCache

    assert config.block_size is not None
    spec = loaded.spec
    shape = (spec.num_layers, config.block_size, spec.num_kv_heads, spec.head_dim)
    kind = Int8KVCache if config.kv_dtype == "int8" else KVCache
    dtype: torch.dtype = loaded.dtype
    return kind.bytes_per_block(*shape, dtype)
