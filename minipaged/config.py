"""Every setting a user can give, documented and validated here, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.memory.eviction import BY_NAME
from minipaged.memory.waste import AHEAD

if TYPE_CHECKING:
    from minipaged.memory.prefix_cache import EvictionPolicy

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "int8")
ATTENTIONS = ("auto", "triton", "native", "torch", "flex")
PREEMPTIONS = ("recompute", "swap")
MANAGERS = ("paged", *AHEAD, "vattention")
MAPPINGS = ("sync", "eager", "async")
BATCHINGS = ("continuous", "static")
EVICTIONS = tuple(BY_NAME)
PROMPT_LOOKUP = "prompt-lookup"
SCHEDULES = ("fcfs", "batchllm")
CHOICES = {
    "device": DEVICES,
    "dtype": DTYPES,
    "kv_dtype": KV_DTYPES,
    "attention": ATTENTIONS,
    "preemption": PREEMPTIONS,
    "memory": MANAGERS,
    "batching": BATCHINGS,
}


def _whole(value: Any, name: str, least: int, error: type[ValueError]) -> None:
    # bool is an Integral in Python; `n=True` is a slip, not a number.
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise error(f"{name} must be a whole number of at least {least}, not {value!r}")


def _real(value: Any, name: str, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise InvalidRequest(f"{name} must be a number between {low:g} and {high:g}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine is built. Nothing here changes while it runs.

    Attributes:
        model: ``"tiny"`` (the embedded model), a directory in Hugging Face format, or a hub id.
        device: ``"auto"`` takes CUDA where there is one, else the CPU.
        dtype: of weights and KV cache. ``"auto"``: the checkpoint's own; on a CPU float32, but for large models stored
            in bfloat16 where the CPU computes with that in hardware (`minipaged doctor` tells).
        kv_dtype: of the KV cache. ``"auto"``: as the weights. ``"int8"``: quantized, with a scale for each token and
            head; the memory of 16-bit numbers holds almost twice as many tokens then, and results change a little.
        attention: what computes it. ``"triton"``: kernels that follow the block tables, on CUDA. ``"native"``: C++ on
            a CPU, compiled at first use, and with it the rest of a step in the same call; int8 and float16 are left to
            torch. ``"torch"``: plain torch, anywhere. ``"flex"``: torch's FlexAttention, on CUDA, with a block size
            that 16 divides. ``"auto"``: Triton where there are both CUDA and Triton, native on a CPU with a C++
            compiler, else torch.
        cuda_graphs: launch the kernels of a decode step all at once, as a recorded graph. ``None``: where that can be,
            which is with attention by Triton on CUDA.
        block_size: tokens a KV block holds (paper §4.1). ``None``: 16, the paper's default, unless vAttention needs
            more to fill whole pages of memory.
        num_blocks: physical blocks in the pool. ``None``: as many as fit in free memory, but never more than
            ``max_num_seqs`` sequences of ``max_model_len`` tokens could fill.
        max_num_seqs: sequences that may be in the running batch at once. A request with ``n`` samples counts ``n``.
        max_num_batched_tokens: tokens computed in one step, decodes and prefill chunks together.
        max_model_len: tokens a sequence may reach, prompt included. ``None``: what the model was made for.
        memory: who decides which slots a sequence gets: ``"paged"`` hands out blocks as tokens come (the paper's idea).
            ``"orca-max"``, ``"orca-pow2"`` and ``"orca-oracle"`` set contiguous memory aside at admission, as before
            (paper §6.1): for the longest sequence there can be, for the prompt and ``max_tokens`` rounded up to a power
            of two, or for exactly the prompt and ``max_tokens``. They never preempt, and find nothing again.
            ``"vattention"`` is paged, and maps blocks into virtual memory, one range of addresses for each sequence,
            so that attention needs no block tables (Linux CPU and CUDA).
        tensor_slicing: with vAttention, all layers share a tensor, and so a block: fewer tokens fill a page.
        mapping: with vAttention, when blocks are mapped: ``"sync"``, as a step needs them; ``"eager"``, a step before;
            ``"async"``, a step before and in the background. ``None``: in the background.
        batching: ``"continuous"`` admits requests whenever there is room, ``"static"`` only when all that ran together
            have ended (FasterTransformer's way, paper §6.1).
        enable_prefix_caching: keep full blocks of finished requests and share them with prompts that start alike.
            ``None``: where the memory manager can.
        eviction: which cached block is given up first: ``"lru"``, ``"fifo"``, ``"marker"``, or by predicting a chat's
            last turn ``"flush-when-all-0"``, ``"mark-0"``, ``"mark-and-predict"`` (see `minipaged.memory.eviction`).
            ``None``: the least recently used.
        eviction_policy: one of your own instead: a class, or anything that makes an `EvictionPolicy` when called.
        preemption: what a request loses when blocks run out: ``"recompute"`` drops its KV and computes it again later,
            ``"swap"`` moves its blocks to the CPU and back (paper §4.5).
        swap_blocks: CPU blocks to swap to. ``None`` with ``"swap"``: as many as the pool has.
        speculate: guess a sequence's next tokens and compute them in one step; those that the model does not say itself
            are taken back, so that results are distributed as ever. ``"prompt-lookup"`` guesses what followed the
            newest tokens when they last occurred; else a smaller model with the same vocabulary, named like ``model``.
            With prompt lookup a seed gives the same tokens as without. Beam searches go on one token at a time.
        num_speculative_tokens: at most so many are guessed at once. ``None`` with ``speculate``: 4.
        seed: of the random numbers of requests that bring no seed of their own.
    """

    model: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    attention: str = "auto"
    cuda_graphs: bool | None = None
    block_size: int | None = None
    num_blocks: int | None = None
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

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InvalidConfig(f"model must be 'tiny', a directory or a hub id, not {self.model!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidConfig(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.block_size is None and self.memory != "vattention":
            object.__setattr__(self, "block_size", 16)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _whole(getattr(self, name), name, 1, InvalidConfig)
        for name, least in (("block_size", 1), ("num_blocks", 1), ("max_model_len", 2), ("swap_blocks", 1)):
            if getattr(self, name) is not None:
                _whole(getattr(self, name), name, least, InvalidConfig)
        _whole(self.seed, "seed", 0, InvalidConfig)
        if self.cuda_graphs is not None and not isinstance(self.cuda_graphs, bool):
            raise InvalidConfig(f"cuda_graphs must be True, False or None, not {self.cuda_graphs!r}")
        if self.enable_prefix_caching is not None and not isinstance(self.enable_prefix_caching, bool):
            raise InvalidConfig(f"enable_prefix_caching must be True or False, not {self.enable_prefix_caching!r}")
        if self.eviction is not None and self.eviction not in EVICTIONS:
            raise InvalidConfig(f"eviction must be one of {', '.join(EVICTIONS)}, not {self.eviction!r}")
        caching = self.enable_prefix_caching or self.eviction_policy is not None or self.eviction is not None
        if self.memory in AHEAD and (caching or self.preemption != "recompute"):
            raise InvalidConfig(
                f"memory={self.memory!r} neither shares prefixes nor preempts anybody: leave enable_prefix_caching, "
                "eviction, eviction_policy and preemption as they are by default"
            )
        if self.eviction_policy is not None and not (self.caches_prefixes and callable(self.eviction_policy)):
            raise InvalidConfig("eviction_policy must make a policy when called, and needs enable_prefix_caching=True")
        if self.eviction is not None and (self.eviction_policy is not None or not self.caches_prefixes):
            raise InvalidConfig("eviction needs enable_prefix_caching=True, and no eviction_policy beside it")
        if self.attention == "flex" and ((self.block_size or 0) % 16 or self.kv_dtype != "auto"):
            raise InvalidConfig('attention="flex" needs a block_size that 16 divides, and kv_dtype="auto"')
        if self.swap_blocks is not None and self.preemption != "swap":
            raise InvalidConfig('swap_blocks has no effect without preemption="swap"; set both or neither')
        self._check_virtual_memory()
        self._check_speculation()
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Decodes come first: every running sequence must get its token in every step.
            raise InvalidConfig(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that each running sequence can have its token in every step"
            )

    def _check_virtual_memory(self) -> None:
        if not isinstance(self.tensor_slicing, bool):
            raise InvalidConfig(f"tensor_slicing must be True or False, not {self.tensor_slicing!r}")
        if self.mapping is not None and self.mapping not in MAPPINGS:
            raise InvalidConfig(f"mapping must be one of {', '.join(MAPPINGS)}, not {self.mapping!r}")
        if self.memory != "vattention" and (self.tensor_slicing or self.mapping is not None):
            raise InvalidConfig('tensor_slicing and mapping have no effect without memory="vattention"')
        if self.memory == "vattention" and (self.attention in ("triton", "native", "flex") or self.kv_dtype != "auto"):
            raise InvalidConfig(
                'memory="vattention" attends with plain torch to keys and values as they are; '
                "leave attention and kv_dtype out"
            )

    def _check_speculation(self) -> None:
        if self.speculate is not None and (not isinstance(self.speculate, str) or not self.speculate):
            raise InvalidConfig(f"speculate must be {PROMPT_LOOKUP!r} or name a draft model, not {self.speculate!r}")
        if self.num_speculative_tokens is not None:
            _whole(self.num_speculative_tokens, "num_speculative_tokens", 1, InvalidConfig)
            if self.speculate is None:
                raise InvalidConfig("num_speculative_tokens has no effect without speculate; set both or neither")
        if self.drafts_with_model and self.memory == "vattention":
            raise InvalidConfig(
                'memory="vattention" maps the KV cache of one model, and a draft model has its own; '
                f'use speculate="{PROMPT_LOOKUP}" or memory="paged"'
            )

    @property
    def drafts_with_model(self) -> bool:
        """Whether `speculate` names a draft model."""
        return self.speculate not in (None, PROMPT_LOOKUP)

    @property
    def caches_prefixes(self) -> bool:
        """`enable_prefix_caching`, decided."""
        return self.enable_prefix_caching is not False and self.memory not in AHEAD

    def check_schedule(self, schedule: str) -> None:
        """Raises `InvalidRequest` for a schedule that does not exist, `InvalidConfig` if this engine has it not."""
        if schedule not in SCHEDULES:
            raise InvalidRequest(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
        able = self.memory == "paged" and self.caches_prefixes and self.batching == "continuous"
        if schedule == "batchllm" and not able:
            raise InvalidConfig(
                'schedule="batchllm" shares what prompts begin with: it needs memory="paged", batching="continuous", '
                "and enable_prefix_caching left on"
            )

    def swap_space(self, num_blocks: int) -> int:
        """CPU blocks to swap to, for a pool of ``num_blocks``."""
        return (self.swap_blocks or num_blocks) if self.preemption == "swap" else 0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends.

    Applied to the logits in this order: penalties, ``logit_bias``, ``min_tokens``, temperature, top-k, top-p, min-p.

    Attributes:
        n: sequences sampled from one prompt. Their prompt blocks are shared until they differ (paper §4.4).
        temperature: logits are divided by it; 0 means greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest one; 0 drops none.
        repetition_penalty: logits of tokens that occur in prompt or output are divided by it where positive, else
            multiplied; above 1 discourages them (CTRL, Keskar et al. 2019).
        presence_penalty: taken off the logits of tokens that occur in the output.
        frequency_penalty: taken off the logits of output tokens once for each time they occur.
        logit_bias: added to the logits, by token id.
        max_tokens: end with ``"length"`` after this many new tokens; ``None``: up to the model's length.
        stop: strings that end the sequence; the text is cut before them.
        stop_token_ids: tokens that end the sequence beside the model's own end-of-text tokens.
        ignore_eos: go on past the model's end-of-text tokens (for benchmarks).
        min_tokens: end-of-text and stop tokens are impossible before so many new tokens.
        logprobs: report the sampled token's log-probability and those of this many likeliest tokens (0: only the
            sampled one; ``None``: report none). They are taken from the model's own distribution, before any filter.
        prompt_logprobs: the same for each prompt token but the first. Such a request does not use the prefix cache,
            which holds keys and values but no logits.
        beam_width: search with so many beams instead of sampling; the best ``n`` are returned. Needs temperature 0.
        length_penalty: hypotheses are compared by log-probability / length ** length_penalty.
        early_stopping: ``True`` ends the search at ``beam_width`` finished hypotheses, ``False`` when a better one is
            unlikely, ``"never"`` when it is impossible (transformers' definitions).
        seed: makes this request repeat, whatever else is in the batch. ``None``: drawn from the engine's seed.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = 128
    stop: str | Seq[str] = ()
    stop_token_ids: Seq[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    seed: int | None = None

    MAX_LOGPROBS: ClassVar[int] = 20

    def __post_init__(self) -> None:
        _whole(self.n, "n", 1, InvalidRequest)
        _real(self.temperature, "temperature", 0.0, 100.0)
        _whole(self.top_k, "top_k", 0, InvalidRequest)
        _real(self.top_p, "top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequest("top_p must be above 0 (1 keeps every token); for greedy decoding use temperature=0")
        _real(self.min_p, "min_p", 0.0, 1.0)
        if self.max_tokens is not None:
            _whole(self.max_tokens, "max_tokens", 1, InvalidRequest)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop if self.stop is not None else ()
        if not isinstance(stops, Seq) or not all(isinstance(text, str) and text for text in stops):
            raise InvalidRequest(f"stop must be a string or a list of strings, none of them empty; got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stops))
        ids = self.stop_token_ids if self.stop_token_ids is not None else ()
        if not isinstance(ids, (list, tuple, set, frozenset)):
            raise InvalidRequest(f"stop_token_ids must be a list of token ids, not {ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        for token_id in self.stop_token_ids:
            _whole(token_id, "each of stop_token_ids", 0, InvalidRequest)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(getattr(self, name), name, 0, InvalidRequest)
                if getattr(self, name) > self.MAX_LOGPROBS:
                    raise InvalidRequest(f"{name} can be at most {self.MAX_LOGPROBS}, not {getattr(self, name)}")
        if self.seed is not None:
            _whole(self.seed, "seed", 0, InvalidRequest)
        self._check_penalties()
        self._check_beams()

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and filters is asked for."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )

    def _check_penalties(self) -> None:
        _real(self.repetition_penalty, "repetition_penalty", 0.01, 100.0)
        _real(self.presence_penalty, "presence_penalty", -100.0, 100.0)
        _real(self.frequency_penalty, "frequency_penalty", -100.0, 100.0)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest(f"logit_bias must map token ids to numbers, not be {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _whole(token_id, "each token id of logit_bias", 0, InvalidRequest)
            _real(bias, "each value of logit_bias", -1e9, 1e9)
        _whole(self.min_tokens, "min_tokens", 0, InvalidRequest)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")

    def _check_beams(self) -> None:
        if self.beam_width is None:
            if self.length_penalty != 1 or self.early_stopping is not False:
                raise InvalidRequest("length_penalty and early_stopping have no effect without beam_width")
            return
        _whole(self.beam_width, "beam_width", 1, InvalidRequest)
        _real(self.length_penalty, "length_penalty", -100.0, 100.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequest(f'early_stopping must be True, False or "never", not {self.early_stopping!r}')
        if self.n > self.beam_width:
            raise InvalidRequest(f"n ({self.n}) is above beam_width ({self.beam_width})")
        if self.temperature != 0 or self.changes_logits or self.stop or self.prompt_logprobs is not None:
            raise InvalidRequest(
                "beam search follows the model's own probabilities: set temperature=0, and no penalties, logit_bias, "
                "min_tokens, stop strings or prompt_logprobs"
            )
