"""Writes small GGUF files byte by byte, damaged ones too; models with random weights, and what they should contain."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from minipaged.bench.gguf_file import LLAMA

TYPE_OF = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
SCALES = {  # where a block has its 16-bit scales; random bytes there could be infinite
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
Data = tuple[str, tuple[int, ...], bytes]  # a tensor's type, shape (rows first) and bytes


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> bytes:
    """A value of the metadata: its type and its bytes. Bytes are taken as they are, so tests can write anything."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        kind, code = TYPE_OF[type(value[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{code[1]}", *value)
    kind, code = TYPE_OF[type(value)]
    return struct.pack("<I", kind) + struct.pack(code, value)


def write(
    path: Path,
    metadata: Mapping[str | bytes, Any],
    tensors: Mapping[str, Data],
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
    info: Mapping[str, Mapping[str, Any]] | None = None,
    twice: bool = False,
) -> Path:
    """Writes a file. ``counts`` (tensors, keys) and ``info`` (tensor → dims, type, offset) replace the true values."""
    num_tensors = counts[0] if counts[0] is not None else len(tensors) + twice
    num_keys = counts[1] if counts[1] is not None else len(metadata)
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    head += b"".join(text(key) + typed(value) for key, value in metadata.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        number = gguf.GGMLQuantizationType[kind].value
        stated = {"dims": shape[::-1], "type": number, "offset": len(body)} | dict((info or {}).get(name, {}))
        entry = text(name) + struct.pack(f"<I{len(stated['dims'])}Q", len(stated["dims"]), *stated["dims"])
        entry += struct.pack("<IQ", stated["type"], stated["offset"])
        head += entry
        body += raw + b"\0" * (-len(raw) % alignment)
    if twice:
        head += entry
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + body)
    return path


def random_data(kind: str, shape: tuple[int, ...], seed: int = 0) -> Data:
    """A tensor of random blocks."""
    rng = np.random.default_rng(seed)
    if kind == "F32":
        return kind, shape, rng.standard_normal(shape, np.float32).tobytes()
    if kind in ("F16", "BF16"):
        values = torch.from_numpy(rng.standard_normal(shape, np.float32))
        dtype = torch.float16 if kind == "F16" else torch.bfloat16
        return kind, shape, values.to(dtype).view(torch.int16).numpy().tobytes()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (math.prod(shape) // values, size), np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = rng.uniform(-0.02, 0.02, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    return kind, shape, blocks.tobytes()


def dequantized(data: Data) -> torch.Tensor:
    """What the gguf package makes of a tensor, whole."""
    kind, shape, raw = data
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], shape[-1] // values * size)
    return torch.from_numpy(np.array(gguf.quants.dequantize(rows, number))).view(shape)


def metadata_of(config: Any, architecture: str) -> dict[str, Any]:
    """The metadata, without a tokenizer, that llama.cpp's converter would write for a configuration of transformers."""
    stated = {
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "vocab_size": config.vocab_size,
    }  # fmt: skip
    if head_dim := getattr(config, "head_dim", None):
        stated |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    rope = config.rope_parameters
    stated["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        stated |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in stated.items()}


def tensors_of(model: torch.nn.Module, architecture: str) -> dict[str, Data]:
    """A model of transformers as llama.cpp's converter would write it, in float32."""
    config, tensors = model.config, {}
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name, weight in weights.items():
        parts = name.removeprefix("model.").split(".")
        layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        module, suffix = ".".join(parts[2:-1] if layer else parts[:-1]), parts[-1]
        target = LLAMA.get(module) or {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}[module]
        if architecture == "llama" and target in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if target == "attn_q" else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[f"{layer}{target}.{suffix}"] = ("F32", tuple(weight.shape), weight.contiguous().numpy().tobytes())
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(config.head_dim, **rope)
    return tensors


def llama3_divisors(
    head_dim: int,
    *,
    rope_theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    **_: Any,
) -> Data:
    """Llama 3's scaling as llama.cpp's converter computes it: by wavelengths, pair by pair."""
    divisors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope_theta ** (pair / head_dim)
        low, high = (original_max_position_embeddings / one for one in (low_freq_factor, high_freq_factor))
        smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (
            high_freq_factor - low_freq_factor
        )
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < high else factor if wavelength > low else between)
    return "F32", (len(divisors),), np.array(divisors, np.float32).tobytes()


def small_llama(kind: str = "F32", vocab: int = 40, **changes: Any) -> tuple[dict[str, Any], dict[str, Data]]:
    """Metadata and tensors of a Llama with one layer, 256 wide, with matrices of one type."""
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": 256, "llama.feed_forward_length": 256, "llama.block_count": 1,
        "llama.context_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": vocab,
        "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    shapes = {
        "token_embd.weight": (vocab, 256), "output_norm.weight": (256,),
        "blk.0.attn_norm.weight": (256,), "blk.0.ffn_norm.weight": (256,),
        "blk.0.attn_q.weight": (256, 256), "blk.0.attn_k.weight": (128, 256), "blk.0.attn_v.weight": (128, 256),
        "blk.0.attn_output.weight": (256, 256), "blk.0.ffn_gate.weight": (256, 256), "blk.0.ffn_up.weight": (256, 256),
        "blk.0.ffn_down.weight": (256, 256),
    }  # fmt: skip
    tensors = {
        name: random_data(kind if len(shape) > 1 else "F32", shape, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return metadata | changes, tensors
