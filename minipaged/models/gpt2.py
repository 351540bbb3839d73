"""GPT-2. Read ``llama.py`` first; this model is older and simpler.

Positions are learned vectors added to the token embeddings, not rotations; norms subtract the mean and have biases,
as does every projection; the MLP has no gate; and every query head has its own keys and values, so that its
KV cache is several times that of a Llama of the same width. Shapes use the letters of ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.errors import ModelError
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.models.config_json import flag, need, require_plain
from minipaged.models.layers import embedding, paged_attention

ALIASES = {  # names that transformers takes for GPT-2's own
    "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


@dataclass(frozen=True)
class GPT2Config:
    """The contents of ``config.json``, under minipaged's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # always num_heads
    head_dim: int
    max_model_len: int
    norm_eps: float
    windows: tuple[int | None, ...]  # always all None: no layer has a sliding window
    tied: bool  # the output head is the token embedding

    @classmethod
    def from_config(cls, config: dict[str, Any], architecture: str) -> GPT2Config:
        """Reads a parsed ``config.json``. Raises ModelError for missing or unsupported values."""
        config = {ALIASES[name]: value for name, value in config.items() if name in ALIASES} | config
        if config.get("activation_function") != "gelu_pytorch_tanh":  # another name of gelu_new
            require_plain(config, activation_function="gelu_new")
        require_plain(
            config,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            reorder_and_upcast_attn=False,
            add_cross_attention=False,
        )
        num_layers, num_heads = need(config, "n_layer"), need(config, "n_head")
        hidden_size = need(config, "n_embd")
        if hidden_size % num_heads:
            raise ModelError(f"config.json: n_embd = {hidden_size} is not a multiple of n_head = {num_heads}")
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need(config, "n_inner", default=4 * hidden_size),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            max_model_len=need(config, "n_positions"),
            norm_eps=need(config, "layer_norm_epsilon", float, default=1e-5),
            windows=(None,) * num_layers,
            tied=flag(config, "tie_word_embeddings", True),
        )


class Attention(nn.Module):
    """Multi-head attention over KV blocks. [T, C] → [T, C]."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.scale = layer, config.head_dim, config.head_dim**-0.5
        width = config.num_heads * config.head_dim  # hidden_size, or this rank's share of it
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, -1, self.head_dim))  # [T, 3·H·D] → [T, 3, H, D]
        q, k, v = qkv.unbind(dim=1)  # [T, H, D] each
        out = paged_attention(q, k, v, batch, kv_cache, self.layer, self.scale)
        return self.c_proj(out.flatten(1))  # [T, H, D] → [T, H·D] = [T, C]


class MLP(nn.Module):
    """Two linear layers with GELU between them. [T, C] → [T, F] → [T, C]."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 was trained with the tanh approximation, so the exact GELU would be wrong.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class DecoderLayer(nn.Module):
    """One layer: attention, then MLP; each reads the residual stream through a norm and adds to it. [T, C] → [T, C]."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        x = x + self.attn(self.ln_1(x), batch, kv_cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The whole model. Its modules have the names of Hugging Face checkpoints, so loading needs no mapping of names."""

    PREFIX = "transformer."  # before every name except the head's; the oldest checkpoints have none

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = embedding(config.vocab_size, config.hidden_size)
        self.wpe = embedding(config.max_model_len, config.hidden_size)
        self.h = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        # Only the head's weight is used, and the embedding's has the same shape: a tied head is just a second name.
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = self.wte if config.tied else head

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """One step. Writes the KV of the T tokens into ``kv_cache``; returns logits [R, V] in float32."""
        x = self.wte(batch.token_ids) + self.wpe(batch.positions)  # [T, C]
        for block in self.h:
            x = block(x, batch, kv_cache)
        x = self.ln_f(x[batch.logit_rows])  # [R, C]: logits only for rows that are sampled from
        return F.linear(x, self.lm_head.weight).float()  # [R, V]

    def checkpoint_views(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each checkpoint tensor's name (without PREFIX) and the view of a parameter to copy it into.

        GPT-2's projections are stored as [in, out], a Linear's as [out, in]: the view is the transpose.
        """
        for name, parameter in self.named_parameters():
            turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            yield name, parameter.T if turned else parameter
