"""A step of a whole model in one call of the C++ kernels (``kernels/forward.h``), in place of some hundred of torch's.

What it computes is what the model's own ``forward`` says, on the same weights and the same KV cache.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.kernels import native
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama

LAYER = ("norm", "norm_bias", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias")
LAYER += ("mlp_norm", "mlp_norm_bias", "up", "up_bias", "down", "down_bias", "k_cache", "v_cache")
SIZES = ("num_layers", "C", "H", "KH", "D", "F", "V", "S", "gated", "centered")
WEIGHTS = ("embedding", "positions", "frequencies", "norm", "norm_bias", "head", "layers")
COUNTS = ("T", "B", "R", "table_row", "threads")
LISTS = ("tokens", "positions", "slots", "tables", "context_lens", "query_lens", "logit_rows", "logits")


class _Layer(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in LAYER), ("window", ctypes.c_int64)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in WEIGHTS),
    ]


class _Step(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in COUNTS), *((name, ctypes.c_void_p) for name in LISTS)]


class NativeForward:
    """Runs batches of one model on one KV cache. Raises ValueError for a model that the kernels cannot run."""

    def __init__(self, model: nn.Module, kv_cache: KVCache) -> None:
        self._weights: list[Tensor] = []  # what the pointers below point to
        dtype = kv_cache.k[0].dtype
        self._forward = native.function("forward", dtype)
        blocks = [self._llama(b) if isinstance(model, Llama) else self._gpt2(b) for b in self._blocks(model)]
        layers = (_Layer * len(blocks))()
        for i, parts in enumerate(blocks):
            parts |= {"k_cache": kv_cache.k[i], "v_cache": kv_cache.v[i]}
            layers[i] = _Layer(**self._pointers(parts), window=model.config.windows[i] or 0)
        self._layers = layers
        c = model.config
        self._model = _Model(
            num_layers=c.num_layers, C=c.hidden_size, H=c.num_heads, KH=c.num_kv_heads, D=c.head_dim,
            F=c.intermediate_size, V=c.vocab_size, S=kv_cache.block_size, gated=isinstance(model, Llama),
            centered=isinstance(model, GPT2), eps=c.norm_eps, scale=c.head_dim**-0.5, layers=ctypes.addressof(layers),
            **self._pointers(self._ends(model)),
        )  # fmt: skip
        self._vocab_size = c.vocab_size

    def covers(self, batch: Batch) -> bool:
        return batch.observe is None and not batch.read_only and batch.slots is None

    def run(self, batch: Batch) -> Tensor:
        """Logits [R, V] in float32."""
        lens = torch.tensor(batch.query_lens)
        logits = torch.empty(len(batch.logit_rows), self._vocab_size)
        tables = batch.block_tables
        step = _Step(
            len(batch.token_ids), len(tables), len(logits), tables.stride(0), torch.get_num_threads(),
            batch.token_ids.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr(), tables.data_ptr(),
            batch.context_lens.data_ptr(), lens.data_ptr(), batch.logit_rows.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        self._forward(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _blocks(self, model: Any) -> Any:
        return model.layers if isinstance(model, Llama) else model.h

    def _llama(self, block: Any) -> dict[str, Tensor | None]:
        attention, mlp = block.self_attn, block.mlp
        return {
            "norm": block.input_layernorm.weight,
            "qkv": attention.qkv_proj.weight,
            "qkv_bias": attention.qkv_proj.bias,
            "q_norm": getattr(attention.q_norm, "weight", None),
            "k_norm": getattr(attention.k_norm, "weight", None),
            "out": attention.o_proj.weight,
            "mlp_norm": block.post_attention_layernorm.weight,
            "up": mlp.gate_up_proj.weight,
            "down": mlp.down_proj.weight,
        }

    def _gpt2(self, block: Any) -> dict[str, Tensor | None]:
        parts = {
            "norm": block.ln_1, "qkv": block.attn.c_attn, "out": block.attn.c_proj,
            "mlp_norm": block.ln_2, "up": block.mlp.c_fc, "down": block.mlp.c_proj,
        }  # fmt: skip
        return {n: p.weight for n, p in parts.items()} | {f"{n}_bias": p.bias for n, p in parts.items()}

    def _ends(self, model: Any) -> dict[str, Tensor | None]:
        if isinstance(model, Llama):
            return {
                "embedding": model.embed_tokens.weight, "frequencies": model.rotary.frequencies,
                "norm": model.norm.weight, "head": model.lm_head.weight,
            }  # fmt: skip
        return {
            "embedding": model.wte.weight, "positions": model.wpe.weight, "norm": model.ln_f.weight,
            "norm_bias": model.ln_f.bias, "head": model.lm_head.weight,
        }  # fmt: skip

    def _pointers(self, parts: dict[str, Tensor | None]) -> dict[str, int]:
        tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        self._weights += tensors.values()
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}
