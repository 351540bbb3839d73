"""A model family of your own: IBM's Granite, a Llama with four multipliers.

    minipaged visualize --plugin examples/granite.py --model DIRECTORY
    LLM(DIRECTORY, model_families=FAMILY)

``DIRECTORY`` holds a checkpoint whose config.json says ``"architectures": ["GraniteForCausalLM"]``. A family is a
network and its configuration, both of the kind of `minipaged.models.llama`; weights are found by their names. The C++
step knows only the families that minipaged has, so this one runs in torch.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.models.config_json import need
from minipaged.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class GraniteConfig(LlamaConfig):
    """What ``config.json`` says beyond a Llama's."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # in place of 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @classmethod
    def from_config(cls, config: dict[str, Any], architecture: str) -> "GraniteConfig":
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        llama = LlamaConfig.from_config(config, "LlamaForCausalLM")
        return cls(**vars(llama), **{name: need(config, name, float, default=1.0) for name in names})


class Granite(Llama):
    """[T] tokens → logits [R, V], as `Llama`, with the multipliers where Granite has them."""

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__(config)
        self.multipliers = config
        for layer in self.layers:
            layer.self_attn.scale = config.attention_multiplier

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        config = self.multipliers
        x = self.embed_tokens(batch.token_ids) * config.embedding_multiplier  # [T, C]
        cos, sin = self.rotary(batch, x.dtype)
        for layer in self.layers:
            attended = layer.self_attn(layer.input_layernorm(x), cos, sin, batch, kv_cache)
            x = x + attended * config.residual_multiplier
            x = x + layer.mlp(layer.post_attention_layernorm(x)) * config.residual_multiplier
        x = self.norm(x[batch.logit_rows])  # [R, C]
        return (x @ self.lm_head.weight.T).float() / config.logits_scaling  # [R, V]


FAMILY = {"GraniteForCausalLM": (Granite, GraniteConfig)}
SETTINGS = {"model_families": FAMILY}
