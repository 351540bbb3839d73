"""Rotary positions (RoPE, Su et al. 2021): how fast pairs of channels rotate, and how that is scaled for long contexts.

A model is trained on sequences of some length. Farther positions would turn the slow pairs by angles that it has never
seen, so each kind of scaling slows pairs down. All kinds compute what transformers computes for the same config.json.

=========  ==========================================================================================================
default    no scaling
linear     every pair is slowed down by ``factor``
llama3     only pairs that turn less than ``low_freq_factor`` times within ``original_max_len`` tokens are; those that
           turn more than ``high_freq_factor`` times are unchanged, and those between are interpolated. GGUF files state
           the result: what each pair's frequency is divided by
yarn       the same idea (Peng et al. 2023), interpolated between ``beta_slow`` and ``beta_fast`` turns by the number of
           the pair; cosines and sines are multiplied by ``attention_factor``, which sharpens attention
dynamic    no scaling up to ``original_max_len`` tokens; beyond, a larger theta that depends on the sequence's length
=========  ==========================================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipaged.errors import ModelError
from minipaged.execution.batch import Batch
from minipaged.models.config_json import flag, need, require_plain

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True)
class Rope:
    """Parameters of rotary positions. Which of them count depends on ``kind``, one of `KINDS`."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192  # tokens in the longest sequence of the training before scaling
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn interpolates between whole numbers of pairs
    attention_factor: float = 1.0  # cosines and sines are multiplied by it
    divisors: tuple[float, ...] = ()  # of llama3, from a GGUF file: one for each pair, in place of the four numbers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rope:
        """Reads ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (older versions).

        Raises ModelError for an unsupported kind of scaling, and for missing or impossible values.
        """
        params = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(params, dict) or any(isinstance(value, dict) for value in params.values()):
            raise ModelError("config.json: rope_parameters must be one flat object, the same for all layers")
        kind = params.get("rope_type") or params.get("type") or "default"
        if kind not in KINDS:
            raise ModelError(f"config.json: rope type {kind!r} is not supported; {', '.join(KINDS)} are")
        require_plain(config | params, partial_rotary_factor=1.0)
        theta = need(config | params, "rope_theta", float, default=10_000.0)
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, need(params, "factor", float))
        if params.get("divisors"):
            return cls(theta, kind, divisors=tuple(params["divisors"]))
        trained = need(config, "max_position_embeddings")
        if kind == "dynamic":  # in which transformers counts from max_position_embeddings, whatever else is given
            return cls(theta, kind, need(params, "factor", float), original_max_len=trained)
        # In transformers the value beside rope_parameters wins over the one in it.
        original = need(params | config, "original_max_position_embeddings", default=trained)
        if kind == "yarn":
            return _yarn(params, theta, trained, original)
        slow, fast = need(params, "low_freq_factor", float), need(params, "high_freq_factor", float)
        if slow >= fast:
            raise ModelError(f"config.json: high_freq_factor ({fast}) must be above low_freq_factor ({slow})")
        return cls(theta, kind, need(params, "factor", float), slow, fast, original)

    def max_len(self, max_position_embeddings: int) -> int:
        """The tokens that a sequence may have. Configurations of these kinds often state the length before scaling."""
        stated = {"linear": max_position_embeddings, "dynamic": self.original_max_len, "yarn": self.original_max_len}
        return max(max_position_embeddings, int(min(stated.get(self.kind, 0) * self.factor, 2**31)))

    @property
    def dynamic_after(self) -> int | None:
        """Tokens from which on rotations depend on a sequence's length; ``None``: they never do."""
        return self.original_max_len if self.kind == "dynamic" else None

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per token of each pair of channels: [D/2] float32, on the CPU."""
        pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        freq = 1.0 / self.theta ** (pair / head_dim)
        if self.kind == "linear":
            return freq / self.factor
        if self.divisors:
            return freq / torch.tensor(self.divisors, device="cpu")
        if self.kind == "llama3":
            turns = self.original_max_len * freq / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.kind == "yarn":
            first, last = self._interpolated(head_dim)
            keep = (last - pair / 2) / (last - first)
        else:
            return freq
        keep = keep.clamp(0, 1)  # 0: slowed down by the factor; 1: unchanged
        return keep * freq + (1 - keep) * freq / self.factor

    def _interpolated(self, head_dim: int) -> tuple[float, float]:
        """Yarn: the pairs that turn ``beta_fast`` and ``beta_slow`` times within the original length."""

        def pair(turns: float) -> float:
            return head_dim * math.log(self.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The upper limit should be the number of pairs. It is the number of channels in all implementations.
        first, last = max(first, 0), min(last, head_dim - 1)
        return first, last if first != last else last + 0.001

    def adapted(self, frequencies: Tensor, batch: Batch) -> Tensor:
        """Each token's frequencies, for the length of its sequence: [D/2] if it does not matter, else [T, D/2].

        As in transformers, the tokens of a prompt rotate for the prompt's length, and a generated token for the length
        that the sequence has with it; keys in the cache are not rotated again. So chunks and preemption change nothing,
        but prompts of different lengths cannot share blocks (`minipaged.build` turns off the prefix cache).
        """
        if self.kind != "dynamic":
            return frequencies
        lengths = batch.positions + 1  # [T]
        if batch.prompt_lens is not None:
            prompts = torch.tensor(batch.prompt_lens).repeat_interleave(torch.tensor(batch.query_lens))
            lengths = lengths.maximum(prompts.to(lengths.device))
        head_dim = 2 * len(frequencies)
        growth = self.factor * lengths / self.original_max_len - (self.factor - 1)  # 1 at the original length
        theta = self.theta * growth.clamp(min=1) ** (head_dim / (head_dim - 2))
        pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=lengths.device)
        slower = 1.0 / theta[:, None] ** (pair / head_dim)  # [T, D/2]
        return torch.where(lengths[:, None] > self.original_max_len, slower, frequencies)


def _yarn(params: dict[str, Any], theta: float, trained: int, original: int) -> Rope:
    # A factor of null means the ratio of the two lengths; if it is missing, transformers refuses the file, too.
    factor = need(params, "factor", float, default=trained / original if "factor" in params else None)
    log = 0.1 * math.log(max(factor, 1))
    inferred = 1 + log  # the paper's recommendation
    if params.get("mscale") and params.get("mscale_all_dim"):  # DeepSeek's
        inferred = (1 + need(params, "mscale", float) * log) / (1 + need(params, "mscale_all_dim", float) * log)
    if theta <= 1:
        raise ModelError(f"config.json: rope_theta must be above 1 for rope type 'yarn', but is {theta}")
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_len=original,
        beta_fast=need({"beta_fast": params.get("beta_fast") or 32.0}, "beta_fast", float),
        beta_slow=need({"beta_slow": params.get("beta_slow") or 1.0}, "beta_slow", float),
        truncate=flag(params, "truncate", True),
        attention_factor=need(params, "attention_factor", float, default=inferred),
    )
