"""Llama and models of the same architecture: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3. From config to logits.

They are one model with small differences, each a field of `LlamaConfig`: Qwen2 adds biases to the query, key
and value projections (Llama and Qwen3 optionally, and to the output projection, too), Qwen3 norms queries and keys,
Mistral (and optionally Qwen) has a sliding window.

The tokens of all sequences are flattened, without padding: [T, C]. Only attention distinguishes sequences, with
the block tables and lengths in the batch. Shapes use the letters of ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.errors import ModelError  # typed errors
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.kernels import reference
from minipaged.models.config_json import flag, need, require_plain
from minipaged.models.layers import RMSNorm, RotaryEmbedding, embedding, paged_attention
from minipaged.models.rope import Rope  # the parameters of rotary positions

KV_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}  # transformers' defaults


@dataclass(frozen=True)
class LlamaConfig:
    """The contents of ``config.json``, under minipaged's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # per layer: tokens that a token sees, itself included; None: all
    qkv_bias: bool
    qk_norm: bool
    tied: bool  # the output head is the token embedding
    out_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any], architecture: str) -> LlamaConfig:
        """Reads a parsed ``config.json``. Raises ModelError for missing or unsupported values."""
        require_plain(config, hidden_act="silu", rope_interleaved=False, num_experts=0, num_local_experts=0)
        if architecture != "LlamaForCausalLM":
            require_plain(config, mlp_bias=False)
        if architecture == "MistralForCausalLM":
            require_plain(config, attention_bias=False)
        qwen2 = architecture == "Qwen2ForCausalLM"  # always has the first three biases, and never the fourth
        qwen3 = architecture == "Qwen3ForCausalLM"
        biased = not qwen2 and flag(config, "attention_bias")
        rope = Rope.from_config(config)
        num_heads, hidden_size = need(config, "num_attention_heads"), need(config, "hidden_size")
        num_layers = need(config, "num_hidden_layers")
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=need(config, "num_key_value_heads", default=KV_HEADS.get(architecture, num_heads)),
            head_dim=need(config, "head_dim", default=128 if qwen3 else hidden_size // num_heads),
            max_model_len=rope.max_len(need(config, "max_position_embeddings")),
            norm_eps=need(config, "rms_norm_eps", float, default=1e-6),
            rope=rope,
            windows=_windows(config, architecture, num_layers),
            qkv_bias=qwen2 or biased,
            qk_norm=qwen3,
            tied=flag(config, "tie_word_embeddings"),
            out_bias=biased,
            mlp_bias=flag(config, "mlp_bias"),
        )

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            shared = f"{self.num_kv_heads} key/value heads"
            raise ModelError(f"config.json: {self.num_heads} heads cannot share {shared} evenly")
        if self.head_dim % 2:
            raise ModelError(f"config.json: head_dim must be even for rotary positions, but is {self.head_dim}")
        if self.rope.dynamic_after is not None and self.head_dim < 4:
            raise ModelError(f"config.json: head_dim must be 4 or more for dynamic RoPE, but is {self.head_dim}")


def _windows(config: dict[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window. The families use the same keys in config.json, but with different meanings."""
    if architecture == "LlamaForCausalLM":
        require_plain(config, sliding_window=None, use_sliding_window=False)
    slides = architecture == "MistralForCausalLM" or bool(config.get("use_sliding_window"))
    # A missing key means 4096, but null means no window: this is transformers' default, and checkpoints rely on it.
    window = config.get("sliding_window", 4096) if slides else None
    if window is not None:
        window = need({"sliding_window": window}, "sliding_window")

    # Qwen: the first layers have no window, unless layer_types lists every layer.
    first = config.get("max_window_layers", 28) if architecture.startswith("Qwen") else 0
    windows = tuple(window if layer >= first else None for layer in range(num_layers))
    named = config.get("layer_types")
    if named is None:
        return windows
    meaning = {"full_attention": None, "sliding_attention": window}
    if not isinstance(named, list) or len(named) != num_layers or any(str(name) not in meaning for name in named):
        raise ModelError(f"config.json: layer_types must list {num_layers} layers, each {' or '.join(meaning)}")
    if window is None and "sliding_attention" in named:
        raise ModelError("config.json: layer_types asks for sliding attention, but sliding_window is off")
    return tuple(meaning[name] for name in named)


class Attention(nn.Module):
    """Grouped-query attention over KV blocks: H query heads share KH key/value heads. [T, C] → [T, C]."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        self.q_size, self.kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        # One wide matrix product uses a device better than three narrow ones.
        self.qkv_proj = nn.Linear(config.hidden_size, self.q_size + 2 * self.kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.q_size, config.hidden_size, bias=config.out_bias)
        if config.qk_norm:  # each head by itself, all with the same weights: hence the size
            self.q_norm: nn.Module = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm: nn.Module = RMSNorm(config.head_dim, config.norm_eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        q, k, v = self.qkv_proj(x).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = q.unflatten(-1, (-1, self.head_dim))  # [T, H·D] → [T, H, D]
        k = k.unflatten(-1, (-1, self.head_dim))  # [T, KH·D] → [T, KH, D]
        v = v.unflatten(-1, (-1, self.head_dim))  # [T, KH·D] → [T, KH, D]
        q, k = self.q_norm(q), self.k_norm(k)
        out = paged_attention(q, k, v, batch, kv_cache, self.layer, self.scale, self.window, rope=(cos, sin))
        return self.o_proj(out.flatten(1))  # [T, H, D] → [T, H·D] → [T, C]


class MLP(nn.Module):
    """SwiGLU: one projection gates the other. [T, C] → [T, C]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(reference.silu_mul(self.gate_up_proj(x)))  # [T, C] → [T, 2·F] → [T, F] → [T, C]


class DecoderLayer(nn.Module):
    """One layer: attention, then MLP; each reads the residual stream through a norm and adds to it. [T, C] → [T, C]."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        delta = self.self_attn(self.input_layernorm(x), cos, sin, batch, kv_cache)
        between = self.post_attention_layernorm  # Triton computes sum and norm in one kernel; other norms are torch's
        x, normed = kv_cache.kernels.add_norm(x, delta, between.weight, between.eps)
        return x + self.mlp(normed)


class Llama(nn.Module):
    """The whole model. Its modules have the names of Hugging Face checkpoints, so loading needs almost no mapping."""

    PREFIX = "model."  # checkpoints put it before every name except the head's

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Only the head's weight is used, and the embedding's has the same shape: a tied head is just a second name.
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = self.embed_tokens if config.tied else head

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """One step. Writes the KV of the T tokens into ``kv_cache``; returns logits [R, V] in float32."""
        x = self.embed_tokens(batch.token_ids)  # [T, C]
        cos, sin = self.rotary(batch, x.dtype)  # [T, 1, D] each
        for layer in self.layers:
            x = layer(x, cos, sin, batch, kv_cache)
        # A prompt of 1,000 tokens needs one row of logits: selecting it first saves 999 products with the vocabulary.
        x = self.norm(x[batch.logit_rows])  # [R, C]
        return F.linear(x, self.lm_head.weight).float()  # [R, V]

    def checkpoint_views(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each checkpoint tensor's name (without PREFIX) and the view of a parameter to copy it into.

        The parts of a fused projection are rows of it, so copying them there fuses them.
        """
        c = self.config
        qkv = [heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        fused = {
            "qkv_proj": (("q_proj", "k_proj", "v_proj"), qkv),
            "gate_up_proj": (("gate_proj", "up_proj"), [c.intermediate_size] * 2),
        }
        for name, parameter in self.named_parameters():
            module = name.split(".")[-2]
            parts, sizes = fused.get(module, ((module,), [len(parameter)]))
            for part, rows in zip(parts, parameter.split(sizes), strict=True):
                yield name.replace(module, part), rows
