"""Runs a step of the whole model in one C++ call (``kernels/forward.h``) instead of hundreds of torch calls.

It computes what the model's own ``forward`` computes, with the same weights, on the same KV cache.
``attention="native"`` (the default on a CPU with a C++ compiler) enables it. It is a ``forward`` for
`execution.runner.ModelRunner`. Read ``kernels/forward.h`` first; ``kernels/attention.h`` walks the block table. The
page does not show it: the events are the same.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.kernels import native
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama

# Largest product of tokens and weights that one thread computes: about a millisecond. Several threads are a fifth
# faster on an idle machine, and ten times slower on a busy one, because they wait for each other a hundred times per
# step. A laptop that draws the visualizer's page is busy.
SMALL = 64_000_000


def _structure(numbers: str, floats: str, pointers: str, more: str = "") -> type[ctypes.Structure]:
    """A ctypes structure that mirrors a struct of forward.h, with these member names."""
    kinds = ((numbers, ctypes.c_int64), (floats, ctypes.c_double), (pointers, ctypes.c_void_p), (more, ctypes.c_int64))
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("_Structure", (ctypes.Structure,), {"_fields_": fields})


_Layer = _structure(
    "", "", "norm norm_bias qkv qkv_bias q_norm k_norm out out_bias mlp_norm mlp_norm_bias up up_bias down down_bias "
    "k_cache v_cache", "window",
)  # fmt: skip
_Model = _structure(
    "num_layers C H KH D F V S gated centered", "eps scale rotary_scale",
    "embedding positions frequencies norm norm_bias head layers",
)  # fmt: skip
_Step = _structure(
    "T B R table_row threads", "", "tokens positions slots tables context_lens query_lens logit_rows logits"
)


class NativeForward:
    """Runs a model of `FAMILIES` on one KV cache. Use it only if `unserved` has no reason against it."""

    def __init__(self, model: Any, kv_cache: KVCache) -> None:
        config = model.config
        family = FAMILIES[type(model)]
        layers, ends = family.parts(model)
        rope = getattr(config, "rope", None)  # GPT-2 has none
        self._kept: list[Tensor] = []  # keeps alive what the pointers point to
        self._layers = (_Layer * len(layers))(*(
            _Layer(**self._pointers(parts | {"k_cache": kv_cache.k[i], "v_cache": kv_cache.v[i]}),
                   window=config.windows[i] or 0)
            for i, parts in enumerate(layers)
        ))  # fmt: skip
        self._model = _Model(
            num_layers=len(layers), C=config.hidden_size, H=config.num_heads, KH=config.num_kv_heads, D=config.head_dim,
            F=config.intermediate_size, V=config.vocab_size, S=kv_cache.block_size, gated=family.gated,
            centered="norm_bias" in ends, eps=config.norm_eps, scale=config.head_dim**-0.5,
            rotary_scale=rope.attention_factor if rope else 1.0, layers=ctypes.addressof(self._layers),
            **self._pointers(ends),
        )  # fmt: skip
        self._forward = native.function("forward", kv_cache.k[0].dtype)
        self._model_forward, self._dynamic_after = model, rope and rope.dynamic_after
        self._vocab_size = config.vocab_size
        self._weights = sum(parameter.numel() for parameter in model.parameters())

    @staticmethod
    def unserved(model: Any, kv_cache: KVCache) -> str:
        """Why the model must run its own ``forward``, in torch; empty if the kernels support it.

        They support some classes, dtypes and widths. A subclass may compute something else.
        """
        if kv_cache.kernels.name != "native":
            return f"attention is {kv_cache.kernels.name!r}"
        if type(model) not in FAMILIES:
            return f"there is none for {type(model).__name__}"
        dtype, config = kv_cache.k[0].dtype, model.config
        if dtype not in native.TYPES or {p.dtype for p in model.parameters()} != {dtype}:
            return f"weights and KV cache must both be {' or '.join(native.TYPES.values())}"
        if config.head_dim * dtype.itemsize % 4:  # attention reads bfloat16 in pairs
            return f"head_dim is {config.head_dim}, which is odd"
        if config.head_dim % 16 and any("q_norm" in name for name, _ in model.named_parameters()):
            # A norm processes one register at a time, up to 16 numbers.
            return f"heads have norms, and head_dim is {config.head_dim}, not a multiple of 16"
        for width in (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size):
            if width * dtype.itemsize % 64:
                return f"a layer is {width} wide, not a multiple of {64 // dtype.itemsize}"
        return ""

    def __call__(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Runs one step; ``kv_cache`` must be the one that this object was made for.

        With dynamic RoPE the model itself runs steps with sequences so long that they rotate more slowly.
        """
        lengths = (*batch.context_lens_list, *(batch.prompt_lens or ()))
        if self._dynamic_after is not None and max(lengths) > self._dynamic_after:
            return self._model_forward(batch, kv_cache)
        return self.run(batch)

    def run(self, batch: Batch) -> Tensor:
        """Runs one step: writes the KV of the T tokens and returns logits [R, V] in float32."""
        tables, lens = batch.block_tables, array("q", batch.query_lens)
        num_tokens, num_rows = batch.token_ids.numel(), batch.logit_rows.numel()
        logits = torch.empty(num_rows, self._vocab_size)
        threads = 1 if num_tokens * self._weights <= SMALL else torch.get_num_threads()
        step = _Step(
            num_tokens, len(lens), num_rows, tables.stride(0), threads,
            batch.token_ids.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr(), tables.data_ptr(),
            batch.context_lens.data_ptr(), lens.buffer_info()[0], batch.logit_rows.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        self._forward(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _pointers(self, parts: dict[str, Tensor | None]) -> dict[str, int]:
        tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        self._kept += tensors.values()
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}


Parts = dict[str, Tensor | None]  # by forward.h's names


def _llama(model: Any) -> tuple[list[Parts], Parts]:
    """The weights of each layer, and the weights before and after the layers."""
    layers: list[Parts] = [
        {
            "norm": layer.input_layernorm.weight,
            "qkv": layer.self_attn.qkv_proj.weight,
            "qkv_bias": layer.self_attn.qkv_proj.bias,
            "q_norm": getattr(layer.self_attn.q_norm, "weight", None),
            "k_norm": getattr(layer.self_attn.k_norm, "weight", None),
            "out": layer.self_attn.o_proj.weight,
            "out_bias": layer.self_attn.o_proj.bias,
            "mlp_norm": layer.post_attention_layernorm.weight,
            "up": layer.mlp.gate_up_proj.weight,
            "up_bias": layer.mlp.gate_up_proj.bias,
            "down": layer.mlp.down_proj.weight,
            "down_bias": layer.mlp.down_proj.bias,
        }
        for layer in model.layers
    ]
    ends = {"embedding": model.embed_tokens.weight, "norm": model.norm.weight, "head": model.lm_head.weight}
    return layers, ends | {"frequencies": model.rotary.frequencies}


def _gpt2(model: Any) -> tuple[list[Parts], Parts]:
    """The same for GPT-2, in which all parts have biases."""
    layers: list[Parts] = []
    for block in model.h:
        parts = {
            "norm": block.ln_1, "qkv": block.attn.c_attn, "out": block.attn.c_proj,
            "mlp_norm": block.ln_2, "up": block.mlp.c_fc, "down": block.mlp.c_proj,
        }  # fmt: skip
        layers.append({name: part.weight for name, part in parts.items()})
        layers[-1] |= {f"{name}_bias": part.bias for name, part in parts.items()}
    ends = {"embedding": model.wte.weight, "positions": model.wpe.weight, "head": model.lm_head.weight}
    return layers, ends | {"norm": model.ln_f.weight, "norm_bias": model.ln_f.bias}


class _Family(NamedTuple):
    parts: Callable[[Any], tuple[list[Parts], Parts]]
    gated: bool  # whether the MLP's first layer also computes gates


FAMILIES: dict[type, _Family] = {Llama: _Family(_llama, gated=True), GPT2: _Family(_gpt2, gated=False)}
