"""`EngineConfig`: every setting of an engine, the core's and the features', documented in one place.

Each feature checks its own values in a function ``check`` next to its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from decimal import Decimal
from os import PathLike, fspath

from minipaged.core.params import CoreConfig, SamplingParams
from minipaged.core.prefix_cache import EvictionPolicy
from minipaged.core.seams import AdmissionPolicy, Stage
from minipaged.errors import InvalidConfig, whole_number
from minipaged.events import Event
from minipaged.events.waste import AHEAD
from minipaged.features import batchllm, contiguous, eviction, speculative, swap, vattention
from minipaged.features.batchllm import SCHEDULES
from minipaged.features.eviction import EVICTIONS
from minipaged.features.speculative import PROMPT_LOOKUP
from minipaged.features.static_batching import BATCHINGS
from minipaged.features.swap import PREEMPTIONS
from minipaged.features.vattention import MAPPINGS

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "int8")
ATTENTIONS = ("auto", "triton", "native", "torch", "flex")
MANAGERS = ("paged", *AHEAD, "vattention")
SIZE_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
CHOICES = {
    "device": DEVICES,
    "dtype": DTYPES,
    "kv_dtype": KV_DTYPES,
    "attention": ATTENTIONS,
    "preemption": PREEMPTIONS,
    "memory": MANAGERS,
    "batching": BATCHINGS,
}

__all__ = [
    "ATTENTIONS",
    "BATCHINGS",
    "CHOICES",
    "DEVICES",
    "DTYPES",
    "EVICTIONS",
    "EngineConfig",
    "KV_DTYPES",
    "MANAGERS",
    "MAPPINGS",
    "PREEMPTIONS",
    "PROMPT_LOOKUP",
    "SCHEDULES",
    "SIZE_UNITS",
    "SamplingParams",
    "num_bytes",
]


def num_bytes(size: int | str, name: str) -> int:
    """A size of memory in bytes: 2147483648, "2147483648" or "2GiB". Raises `InvalidConfig`, which says ``name``."""
    if isinstance(size, str):
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?([A-Za-z]*)", size.strip(), re.ASCII)
        if not found or found[2] not in SIZE_UNITS or ("." in found[1] and not found[2]):
            units = ", ".join(unit for unit in SIZE_UNITS if unit)
            raise InvalidConfig(f"{name} must be a number of bytes, or a number and one of {units}, not {size!r}")
        size = int(Decimal(found[1]) * SIZE_UNITS[found[2]])
    whole_number(size, name, 1, InvalidConfig)
    return size


@dataclass(frozen=True, kw_only=True)
class EngineConfig(CoreConfig):
    """The settings that an engine is built with. They do not change while it runs.

    Attributes:
        model: ``"tiny"`` (the embedded model), a directory in Hugging Face format, a GGUF file, or a hub id.
        device: ``"auto"`` uses CUDA if there is a CUDA device, else the CPU.
        dtype: data type of weights and KV cache. ``"auto"``: that of the checkpoint; on a CPU float32, except for large
            models stored in bfloat16 if the CPU computes bfloat16 in hardware (`minipaged doctor` tells).
        kv_dtype: data type of the KV cache. ``"auto"``: that of the weights. ``"int8"``: quantized, one scale per token
            and head; memory then holds almost twice as many tokens as with 16 bits, and results change a little.
        attention: the attention backend. ``"triton"``: kernels that follow the block tables, on CUDA. ``"native"``: C++
            on a CPU, compiled at first use; one call computes a whole step; int8, float16 and widths that it does not
            support fall back to torch, and the log (INFO) says why.
            ``"torch"``: plain torch, on any device. ``"flex"``: torch's FlexAttention, on CUDA, with a block size that
            is a multiple of 16. ``"auto"``: Triton on CUDA if Triton is installed, native on a CPU with a C++ compiler,
            else torch.
        cuda_graphs: launch all kernels of a decode step at once, as a recorded CUDA graph. ``None``: where supported,
            which is with Triton attention on CUDA.
        block_size: tokens per KV block (paper §4.1). ``None``: 16, the paper's default, unless vAttention needs
            more to fill whole pages of memory.
        num_blocks: physical blocks in the pool. ``None``: as many as fit in free memory, but never more than
            ``max_num_seqs`` sequences of ``max_model_len`` tokens could fill. On a CPU the memory is committed as it is
            used, and limits of control groups (containers) count as the machine's memory.
        kv_memory: the pool's size in bytes instead: a number, or text with a unit, such as ``"2GiB"`` (`SIZE_UNITS`).
            The engine turns it into ``num_blocks``. Swap space is not part of it.
        max_num_seqs: maximum number of sequences in the running batch. A request with ``n`` samples counts ``n``.
        max_num_batched_tokens: maximum number of tokens computed in one step, decodes and prefill chunks together.
        max_model_len: maximum number of tokens in a sequence, prompt included. ``None``: the model's own limit.
        memory: the memory manager. ``"paged"`` allocates blocks as tokens come (the paper's idea).
            ``"orca-max"``, ``"orca-pow2"`` and ``"orca-oracle"`` reserve contiguous memory at admission, as systems
            before paging did (paper §6.1): for the longest possible sequence, for the prompt and ``max_tokens`` rounded
            up to a power of two, or for exactly the prompt and ``max_tokens``. They never preempt and cache no prefix.
            ``"vattention"`` is paged, and maps each sequence's blocks into one contiguous range of virtual addresses,
            so that attention needs no block tables (Linux CPU and CUDA).
        tensor_slicing: with vAttention, all layers share a tensor and therefore a block: fewer tokens fill a page.
        mapping: with vAttention, when blocks are mapped: ``"sync"``, in the step that needs them; ``"eager"``, one step
            earlier; ``"async"``, one step earlier in the background. ``None``: ``"async"``.
        batching: ``"continuous"`` admits requests whenever there is room, ``"static"`` only when the whole previous
            batch has finished (as in FasterTransformer, paper §6.1).
        enable_prefix_caching: keep full blocks of finished requests and share them with prompts that have the same
            prefix. ``None``: if the memory manager supports it, and the model does. With dynamic RoPE, prompts beyond
            the length of the training share none: the cache is on if ``max_model_len`` is at most that length.
        eviction: which cached block is evicted first: ``"lru"``, ``"fifo"``, ``"marker"``, or, by predicting a chat's
            last turn, ``"flush-when-all-0"``, ``"mark-0"``, ``"mark-and-predict"`` (see `minipaged.features.eviction`).
            ``None``: the least recently used.
        eviction_policy: your own policy instead: a class, or any callable that returns an `EvictionPolicy`.
        preemption: how a request is preempted when blocks run out: ``"recompute"`` drops its KV and computes it again
            later, ``"swap"`` moves its blocks to the CPU and back (paper §4.5).
        swap_blocks: CPU blocks to swap to. ``None`` with ``"swap"``: as many as the pool has.
        speculate: draft a sequence's next tokens and verify them in one step; rejected tokens are taken back, so that
            outputs keep their distribution. ``"prompt-lookup"`` drafts the tokens that followed the newest ones when
            they last occurred; otherwise the name of a smaller draft model with the same vocabulary. With prompt lookup
            a seed gives the same tokens as without speculation, up to rounding. Beam searches do not speculate.
        num_speculative_tokens: maximum length of a draft, in tokens. ``None`` with ``speculate``: 4.
        seed: seed of the random numbers of requests that have no seed of their own.
        admission_policy: decides which request is admitted next, in place of first come, first served: a class, or any
            callable that returns a `core.seams.AdmissionPolicy`. Not with ``batching="static"``, which is one.
        stages: callables that each return a `core.seams.Stage`, which acts between the scheduler's decisions.
        subscribers: callables that receive every event, from the start (see `minipaged.events`).
        model_families: further model architectures: the name in ``config.json`` → (network class, configuration
            class), with the interfaces of `models.llama.Llama` and `LlamaConfig`.
    """

    model: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    attention: str = "auto"
    cuda_graphs: bool | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    kv_memory: int | str | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    memory: str = "paged"
    tensor_slicing: bool = False
    mapping: str | None = None
    batching: str = "continuous"
    enable_prefix_caching: bool | None = None
    eviction: str | None = None
    eviction_policy: Callable[[], EvictionPolicy] | None = None
    preemption: str = "recompute"
    swap_blocks: int | None = None
    speculate: str | None = None
    num_speculative_tokens: int | None = None
    seed: int = 0
    admission_policy: Callable[[], AdmissionPolicy] | None = None
    stages: Seq[Callable[[], Stage]] = ()
    subscribers: Seq[Callable[[Event], None]] = ()
    model_families: Mapping[str, tuple[type, type]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "speculate"):  # a Path is a directory's name, too
            if isinstance(getattr(self, name), PathLike):
                object.__setattr__(self, name, fspath(getattr(self, name)))
        if not isinstance(self.model, str) or not self.model:
            raise InvalidConfig(f"model must be 'tiny', a directory, a GGUF file or a hub id, not {self.model!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidConfig(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.block_size is None and self.memory != "vattention":
            object.__setattr__(self, "block_size", 16)
        for name in ("swap_blocks", "num_speculative_tokens"):
            if getattr(self, name) is not None:
                whole_number(getattr(self, name), name, 1, InvalidConfig)
        if self.cuda_graphs is not None and not isinstance(self.cuda_graphs, bool):
            raise InvalidConfig(f"cuda_graphs must be True, False or None, not {self.cuda_graphs!r}")
        super().__post_init__()
        if self.kv_memory is not None:
            if self.num_blocks is not None:
                raise InvalidConfig("kv_memory and num_blocks exclude each other; leave one of them out")
            object.__setattr__(self, "kv_memory", num_bytes(self.kv_memory, "kv_memory"))
        for check in (contiguous.check, eviction.check, swap.check, vattention.check, speculative.check):
            check(self)
        if self.attention == "flex" and ((self.block_size or 0) % 16 or self.kv_dtype != "auto"):
            raise InvalidConfig('attention="flex" needs a block_size that is a multiple of 16, and kv_dtype="auto"')
        self._check_plug_ins()

    def _check_plug_ins(self) -> None:
        if self.admission_policy is not None and not callable(self.admission_policy):
            raise InvalidConfig("admission_policy must be a class or a callable that returns a policy, not an instance")
        if self.admission_policy is not None and self.batching == "static":
            raise InvalidConfig('batching="static" already is an admission policy; leave admission_policy out')
        for name in ("stages", "subscribers"):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(callable(one) for one in given):
                raise InvalidConfig(f"{name} must be a list of callables, not {given!r}")
        for name, family in self.model_families.items() if isinstance(self.model_families, Mapping) else [(None, None)]:
            if not isinstance(name, str) or not isinstance(family, tuple) or len(family) != 2:
                raise InvalidConfig(
                    "model_families must map names of architectures to pairs (network class, configuration class), "
                    f"not be {self.model_families!r}"
                )

    @property
    def drafts_with_model(self) -> bool:
        """Whether `speculate` names a draft model."""
        return self.speculate not in (None, PROMPT_LOOKUP)

    @property
    def caches_prefixes(self) -> bool:
        """Whether the prefix cache is on: `enable_prefix_caching`, with ``None`` resolved."""
        return self.enable_prefix_caching is not False and self.memory not in AHEAD

    def check_schedule(self, schedule: str) -> None:
        """Raises `InvalidRequest` for an unknown schedule, `InvalidConfig` if this engine does not support it."""
        batchllm.check(self, schedule)

    def swap_space(self, num_blocks: int) -> int:
        """CPU blocks to swap to, for a pool of ``num_blocks``."""
        return (self.swap_blocks or num_blocks) if self.preemption == "swap" else 0
