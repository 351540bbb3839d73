"""What a user sets: `CoreConfig` for an engine, `SamplingParams` for a request. Checked here, once."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, ClassVar

from minipaged.errors import InvalidConfig, InvalidRequest, real_number, stop_strings, whole_number  # typed errors


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """The sizes of an engine. `minipaged.config.EngineConfig` adds the settings of features.

    Attributes:
        model: a name, for recordings.
        block_size: tokens that a KV block holds (paper §4.1). ``None``: `minipaged.build` decides.
        num_blocks: physical blocks in the pool. The engine needs a number; `minipaged.build` works one out.
        max_num_seqs: sequences that may run at once. A request with ``n`` samples counts ``n``.
        max_num_batched_tokens: tokens computed in one step, decodes and prefill chunks together.
        max_model_len: tokens a sequence may reach, prompt included. The engine needs a number.
        enable_prefix_caching: prompts that start alike share full blocks. ``None``: if the memory manager can.
        seed: seeds the random numbers of requests that have no seed of their own.
    """

    model: str = "model"
    block_size: int | None = 16
    num_blocks: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            whole_number(getattr(self, name), name, 1, InvalidConfig)
        for name, least in (("block_size", 1), ("num_blocks", 1), ("max_model_len", 2)):
            if getattr(self, name) is not None:
                whole_number(getattr(self, name), name, least, InvalidConfig)
        whole_number(self.seed, "seed", 0, InvalidConfig)
        if self.enable_prefix_caching is not None and not isinstance(self.enable_prefix_caching, bool):
            raise InvalidConfig(f"enable_prefix_caching must be True or False, not {self.enable_prefix_caching!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Decodes come first: every running sequence must get its token in every step.
            raise InvalidConfig(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that each running sequence can have its token in every step"
            )

    @property
    def caches_prefixes(self) -> bool:
        """Whether prefixes are cached: unless ``enable_prefix_caching`` is False."""
        return self.enable_prefix_caching is not False


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
        stop: strings that end the sequence, names of special tokens too; the text is cut before them.
        stop_token_ids: tokens that end the sequence besides the model's own end-of-text tokens.
        ignore_eos: go on past the model's end-of-text tokens (for benchmarks).
        min_tokens: end-of-text and stop tokens are impossible before this many new tokens.
        logprobs: report the sampled token's log-probability and those of this many likeliest tokens (0: only the
            sampled one; ``None``: none). They are of the model's own distribution, before temperature and filters.
        prompt_logprobs: the same for each prompt token but the first. Such a request does not use the prefix cache,
            which holds keys and values but no logits.
        beam_width: search with this many beams instead of sampling; the best ``n`` are returned. Needs temperature 0.
        length_penalty: hypotheses are compared by log-probability / length ** length_penalty.
        early_stopping: ``True`` ends the search at ``beam_width`` finished hypotheses, ``False`` when a better one is
            unlikely, ``"never"`` when it is impossible (transformers' definitions).
        seed: repeats this request on the same machine and schedule, else up to rounding. ``None``: the engine's.
        extra_args: for the engine's admission policy, by name; names that it does not read are refused.
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
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    MAX_LOGPROBS: ClassVar[int] = 20

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("top_k", 0), ("min_tokens", 0)):
            whole_number(getattr(self, name), name, least, InvalidRequest)
        for name, least in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0), ("beam_width", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                whole_number(getattr(self, name), name, least, InvalidRequest)
                if "logprobs" in name and getattr(self, name) > self.MAX_LOGPROBS:
                    raise InvalidRequest(f"{name} can be at most {self.MAX_LOGPROBS}, not {getattr(self, name)}")
        real_number(self.temperature, "temperature", 0.0, 100.0)
        real_number(self.top_p, "top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequest("top_p must be above 0 (1 keeps every token); for greedy decoding use temperature=0")
        real_number(self.min_p, "min_p", 0.0, 1.0)
        object.__setattr__(self, "stop", stop_strings(self.stop))
        ids = self.stop_token_ids if self.stop_token_ids is not None else ()
        if not isinstance(ids, (list, tuple, set, frozenset)):
            raise InvalidRequest(f"stop_token_ids must be a list of token ids, not {ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        for token_id in self.stop_token_ids:
            whole_number(token_id, "each of stop_token_ids", 0, InvalidRequest)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        self._check_penalties()
        self._check_beams()

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and filters is asked for."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias or self.min_tokens)

    def _check_penalties(self) -> None:
        real_number(self.repetition_penalty, "repetition_penalty", 0.01, 100.0)
        real_number(self.presence_penalty, "presence_penalty", -100.0, 100.0)
        real_number(self.frequency_penalty, "frequency_penalty", -100.0, 100.0)
        for name in ("logit_bias", "extra_args"):
            if not isinstance(getattr(self, name), Mapping):
                raise InvalidRequest(f"{name} must be a mapping, not {getattr(self, name)!r}")
        for token_id, bias in self.logit_bias.items():
            whole_number(token_id, "each token id of logit_bias", 0, InvalidRequest)
            real_number(bias, "each value of logit_bias", -1e9, 1e9)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")

    def _check_beams(self) -> None:
        if self.beam_width is None:
            if self.length_penalty != 1 or self.early_stopping is not False:
                raise InvalidRequest("length_penalty and early_stopping have no effect without beam_width")
            return
        real_number(self.length_penalty, "length_penalty", -100.0, 100.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequest(f'early_stopping must be True, False or "never", not {self.early_stopping!r}')
        if self.n > self.beam_width:
            raise InvalidRequest(f"n ({self.n}) is above beam_width ({self.beam_width})")
        if self.temperature != 0 or self.changes_logits or self.stop or self.prompt_logprobs is not None:
            raise InvalidRequest(
                "beam search follows the model's own probabilities: set temperature=0, and no penalties, logit_bias, "
                "min_tokens, stop strings or prompt_logprobs"
            )
