"""Original config.json files of published checkpoints: with old keys, missing keys and unused keys."""

from __future__ import annotations

import pytest

from minipaged.models.gpt2 import GPT2Config
from minipaged.models.layers import Rope
from minipaged.models.llama import LlamaConfig

LLAMA_3_2_1B = dict(
    attention_bias=False,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=dict(
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    vocab_size=128256,
)
SMOLLM2_135M = dict(
    attention_bias=False,
    hidden_act="silu",
    hidden_size=576,
    intermediate_size=1536,
    max_position_embeddings=8192,
    mlp_bias=False,
    num_attention_heads=9,
    num_hidden_layers=30,
    num_key_value_heads=3,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_interleaved=False,
    rope_scaling=None,
    rope_theta=100000,
    tie_word_embeddings=True,
    vocab_size=49152,
)
MISTRAL_7B_V0_1 = dict(
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    vocab_size=32000,
)
QWEN2_5_0_5B = dict(
    hidden_act="silu",
    hidden_size=896,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=24,
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_mrope=False,
    use_sliding_window=False,
    vocab_size=151936,
)
QWEN3_0_6B = dict(
    attention_bias=False,
    head_dim=128,
    hidden_act="silu",
    hidden_size=1024,
    intermediate_size=3072,
    max_position_embeddings=40960,
    max_window_layers=28,
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)


@pytest.mark.parametrize(
    ("architecture", "config", "heads", "windows", "rope"),
    [
        ("Llama", LLAMA_3_2_1B, (32, 8, 64), {None}, Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)),
        ("Llama", SMOLLM2_135M, (9, 3, 64), {None}, Rope(100000)),
        ("Mistral", MISTRAL_7B_V0_1, (32, 8, 128), {4096}, Rope(10000.0)),
        ("Mistral", MISTRAL_7B_V0_1 | dict(sliding_window=None), (32, 8, 128), {None}, Rope(10000.0)),
        ("Qwen2", QWEN2_5_0_5B, (14, 2, 64), {None}, Rope(1000000.0)),
        ("Qwen3", QWEN3_0_6B, (16, 8, 128), {None}, Rope(1000000)),
    ],
)
def test_llama_and_relatives(architecture, config, heads, windows, rope):
    read = LlamaConfig.from_config(config, architecture + "ForCausalLM")
    assert (read.num_heads, read.num_kv_heads, read.head_dim) == heads
    assert set(read.windows) == windows and len(read.windows) == config["num_hidden_layers"]
    assert read.rope == rope and read.tied == config["tie_word_embeddings"]
    assert (read.qkv_bias, read.qk_norm) == (architecture == "Qwen2", architecture == "Qwen3")


def test_gpt2():
    config = dict(
        activation_function="gelu_new",
        layer_norm_epsilon=1e-05,
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        vocab_size=50257,
    )
    read = GPT2Config.from_config(config, "GPT2LMHeadModel")
    assert (read.num_kv_heads, read.head_dim, read.intermediate_size, read.tied) == (12, 64, 3072, True)
