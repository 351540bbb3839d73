"""Converts a Hugging Face checkpoint to a GGUF file for llama.cpp. Runs in the Python that has ``gguf`` installed.

Supports only what `peers.make_checkpoint` makes: Llama and GPT-2 in float32, without a tokenizer.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

LLAMA = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
GPT2 = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(model: str, dtype: str) -> str:
    """Writes a GGUF file to a temporary folder and returns its path; matrices get type ``dtype``, vectors float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((Path(model) / "config.json").read_text())
    llama = config["model_type"] == "llama"
    path = Path(tempfile.mkdtemp()) / "model.gguf"
    writer = gguf.GGUFWriter(path, config["model_type"])
    _describe(writer, config, llama)
    kind = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}[dtype]
    for name, values in load_file(Path(model) / "model.safetensors").items():
        name = name.removeprefix("model.").removeprefix("transformer.")
        head, _, rest = name.partition(".")
        layer, _, part = rest.partition(".") if head in ("layers", "h") else ("", "", name)
        module, _, suffix = part.rpartition(".")
        if not llama and module.endswith(("c_attn", "c_proj", "c_fc")) and suffix == "weight":
            values = values.T
        if module.endswith(("q_proj", "k_proj")):
            values = _interleaved(values, config["num_attention_heads" if "q_" in module else "num_key_value_heads"])
        target = f"{(LLAMA if llama else GPT2)[module]}.{suffix}"
        matrix = values.ndim > 1 and module != "wpe"
        data = gguf.quants.quantize(values.copy(), kind) if matrix else values.copy()
        raw = kind if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"blk.{layer}.{target}" if layer else target, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _interleaved(values: Any, heads: int) -> Any:
    """Reorders a projection's rows: llama.cpp rotates neighbouring channels, Hugging Face those half a head apart."""
    out, size = values.shape
    return values.reshape(heads, 2, out // heads // 2, size).swapaxes(1, 2).reshape(out, size)


def _describe(writer: Any, config: dict[str, Any], llama: bool) -> None:
    heads = config["num_attention_heads" if llama else "n_head"]
    hidden = config["hidden_size" if llama else "n_embd"]
    writer.add_context_length(config["max_position_embeddings" if llama else "n_positions"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers" if llama else "n_layer"])
    writer.add_feed_forward_length(config["intermediate_size"] if llama else 4 * hidden)
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if llama:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(hidden // heads)
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
