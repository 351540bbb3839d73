"""Small configurations of every model family, and random weights that all affect the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

SMALL = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,  # with theta 500, some pairs are kept, some blended, some slowed down
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=500.0,
    factor=4.0,
    beta_fast=8.0,
    original_max_position_embeddings=64,  # some pairs are kept, some blended, some slowed down
)


def config_of(family: str) -> transformers.PreTrainedConfig:
    """The family's configuration, with the options that affect its results."""
    t = transformers
    gpt2 = dict(vocab_size=131, n_embd=48, n_layer=3, n_head=4, n_positions=128)
    made: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
        "gpt2": lambda: t.GPT2Config(**gpt2),
        "gpt2-untied": lambda: t.GPT2Config(**gpt2, n_inner=72, layer_norm_epsilon=0.1, tie_word_embeddings=False),
        "llama2": lambda: t.LlamaConfig(
            **SMALL | dict(num_key_value_heads=4), rms_norm_eps=0.1, tie_word_embeddings=False
        ),
        "llama3": lambda: t.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
        "llama-linear": lambda: t.LlamaConfig(
            **SMALL, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)
        ),
        "llama-yarn": lambda: t.LlamaConfig(**SMALL, rope_parameters=YARN_ROPE),
        "llama-dynamic": lambda: t.LlamaConfig(
            **SMALL, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
        ),
        "llama-biased": lambda: t.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        "smollm2": lambda: t.LlamaConfig(
            **SMALL | dict(num_attention_heads=3, num_key_value_heads=1), tie_word_embeddings=True
        ),
        "mistral": lambda: t.MistralConfig(**SMALL, sliding_window=5, head_dim=16),
        "mistral-full": lambda: t.MistralConfig(**SMALL, sliding_window=None),
        "qwen2": lambda: t.Qwen2Config(**SMALL, tie_word_embeddings=True),
        "qwen2-window": lambda: t.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=20),
        "qwen3-biased": lambda: t.Qwen3Config(**SMALL, head_dim=16, attention_bias=True),
        "qwen3-window": lambda: t.Qwen3Config(
            **SMALL,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    }
    return made[family]()


FAMILIES = (
    *("gpt2", "gpt2-untied", "llama2", "llama3", "llama-linear", "llama-yarn", "llama-dynamic", "llama-biased"),
    *("smollm2", "mistral", "mistral-full", "qwen2", "qwen2-window", "qwen3", "qwen3-biased", "qwen3-window"),
)


def randomize(model: torch.nn.Module) -> None:
    """Replaces the initial values, because biases of 0 and norms of 1 would hide that a model ignores them."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = noise + 1 if is_norm else noise
