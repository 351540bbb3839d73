"""GGUF files, llama.cpp's format: one file that holds configuration, tokenizer and weights, most of them quantized.

Layout: magic, version, counts; metadata (key, type, value); tensors (name, shape, type, offset); padding; their data.
`read_header` reads all but the data, and refuses a damaged file. `GGUFFile` translates it: `config` into the keys of a
``config.json``, `load` the tensors into a network, dequantised in pieces, so that only the final weights take memory.
The package ``gguf`` dequantises. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from minipaged.errors import ModelError

# Number in the file → name, values in a block (which share a scale), bytes of a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 8: ("Q8_0", 32, 34),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip

# --- the header -----------------------------------------------------------------------------------------------------

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAGIC, STRING, ARRAY = b"GGUF", 8, 9
MOST = 1 << 24  # entries of an array; the largest vocabularies have a million


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file. ``shape`` is in torch's order, rows first; the file has it the other way."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file, in bytes
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A file's metadata, and its tensors by name. Raises ModelError if it is damaged or has unsupported types."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()
    except ModelError:
        raise
    except (OSError, ValueError) as error:  # a ValueError: the file is empty, so there is nothing to map
        raise ModelError(f"{path} cannot be read: {error}") from None


class _Header:
    """Reads a mapped file from front to back. Compares counts and sizes with what is left of the file first."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path} is damaged, or not a GGUF file: {what}. Download it again")

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if (magic := self.data[: self.skip(4) + 4]) != MAGIC:
            self.fail(f"it begins with {magic!r}, not {MAGIC!r}")
        if (version := self.number("I")) not in (2, 3):
            raise ModelError(f"{self.path} has GGUF version {version}; minipaged reads versions 2 and 3, little-endian")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.at_most(num_keys, 13)):
            key = self.string()
            if key in metadata:
                self.fail(f"it has the key {brief(key)} twice")
            metadata[key] = self.value(self.number("I"), key)
        listed = [self.tensor() for _ in range(self.at_most(num_tensors, 33))]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {brief(alignment)}, not a power of two")
        tensors: dict[str, TensorInfo] = {}
        start = end = -(-self.at // alignment) * alignment
        for info in sorted(listed, key=lambda info: info.offset):
            name, offset = brief(info.name), start + info.offset
            if info.name in tensors:
                self.fail(f"it has the tensor {name} twice")
            if info.offset % alignment or offset < end:
                self.fail(f"tensor {name} is not aligned to {alignment} bytes, or inside another one")
            if (end := offset + info.num_bytes) > len(self.data):
                self.fail(f"tensor {name} ends at byte {end:,}, but the file has {len(self.data):,}")
            tensors[info.name] = replace(info, offset=offset)
        return metadata, tensors

    def tensor(self) -> TensorInfo:
        name, num_dims = self.string(), self.number("I")
        if not 1 <= num_dims <= 4:
            self.fail(f"tensor {brief(name)} has {num_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in TYPES:
            supported = ", ".join(known for known, *_ in TYPES.values())
            problem = f"tensor {brief(name)} has the unsupported type {_type_name(kind)}"
            raise ModelError(f"{self.path}: {problem}. Supported: {supported}")
        known, values, size = TYPES[kind]
        if 0 in shape or shape[-1] % values:
            self.fail(f"tensor {brief(name)} has shape {list(shape)}, but {known} has blocks of {values} values")
        return TensorInfo(name, kind, shape, offset, math.prod(shape) // values * size)

    def skip(self, size: int) -> int:
        """Advances by ``size`` bytes; returns the position before them."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            self.fail(f"its header does not fit into its {len(self.data):,} bytes")
        return start

    def at_most(self, count: int, size: int) -> int:
        """``count`` itself, if as many entries of at least ``size`` bytes can follow."""
        if count > MOST or count * size > len(self.data) - self.at:
            self.fail(f"its {len(self.data):,} bytes cannot hold the {count:,} entries claimed at byte {self.at:,}")
        return count

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        start = self.skip(self.number("Q"))
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            self.fail(f"the text at byte {start:,} is not UTF-8")

    def value(self, kind: int, key: str) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            self.fail(f"{brief(key)} has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.string() for _ in range(self.at_most(count, 8))]
        if kind not in NUMBERS:
            self.fail(f"{brief(key)} is an array of type {kind}, neither numbers nor texts")
        code, size = NUMBERS[kind], struct.calcsize("<" + NUMBERS[kind])
        return list(struct.unpack_from(f"<{count}{code}", self.data, self.skip(self.at_most(count, size) * size)))


def brief(value: Any) -> str:
    """``repr``, shortened: a hostile file may have a key of a megabyte."""
    return reprlib.repr(value)


# --- from llama.cpp's terms to Hugging Face's -------------------------------------------------------------------------

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ROPE_FREQS = "rope_freqs.weight"  # what each pair's frequency is divided by: Llama 3's scaling

# Options that change results and that the models do not compute; refused unless they are off.
REFUSED = ("expert_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv", "logit_scale",
           "embedding_scale", "residual_scale", "attn_logit_softcapping", "final_logit_softcapping",
           "use_parallel_residual")  # fmt: skip

# Tokens that end a turn. Files name one or two ids; if the chat template writes another of these, it ends turns, too.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>",
               "<|end_of_turn|>", "<EOT>", "<｜end▁of▁sentence｜>")  # fmt: skip
CONTROL = 3  # in tokenizer.ggml.token_type

PIECE = 1 << 17  # values that are dequantised at a time: their float32 fits into a core's cache


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor: ``layers.3.self_attn.q_proj.weight`` → ``blk.3.attn_q.weight``."""
    module, _, suffix = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{suffix}"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


class GGUFFile:
    """A model in a GGUF file. Raises ModelError for a damaged or unsupported file, or without the package ``gguf``."""

    def __init__(self, path: Path) -> None:
        _package()
        self.path = path
        self.metadata, self.tensors = read_header(path)
        self.architecture: str = self.get("general.architecture", str)
        self._refuse_other_files()

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A value of the metadata, of type ``kind``; `get_list` reads lists.

        Raises ModelError if it has another type, or is missing without default.
        """
        value = self.metadata.get(key, default)
        if value is ...:
            raise ModelError(f"{self.path}: the metadata lack {key}")
        if kind is float and type(value) is int:
            value = float(value)
        wrong = type(value) is not kind or (isinstance(value, float) and not math.isfinite(value))
        if value is not default and wrong:
            raise ModelError(f"{self.path}: {key} must be {kind.__name__}, not {brief(value)}")
        return value

    def get_list(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        """A list of the metadata, with entries of type ``kind``, ``length`` of them; empty if it is missing."""
        values = self.get(key, list, [])
        if any(type(value) is not kind for value in values) or (values and length not in (None, len(values))):
            wanted = "" if length is None else f"{length} "
            raise ModelError(
                f"{self.path}: {key} must list {wanted}values of type {kind.__name__}, not {brief(values)}"
            )
        return values

    def _refuse_other_files(self) -> None:
        if self.architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ModelError(
                f"{self.path}: architecture {brief(self.architecture)} is not supported. Supported: {supported}"
            )
        kind = self.get("general.type", str, "model")
        if kind != "model":
            raise ModelError(f"{self.path} holds no model, but (general.type) {brief(kind)}")
        if self.get("split.count", int, 1) > 1:
            raise ModelError(
                f"{self.path} is one of {self.metadata['split.count']} parts; join them with llama.cpp's "
                "llama-gguf-split --merge"
            )
        for option in REFUSED:
            if value := self.metadata.get(f"{self.architecture}.{option}"):
                raise ModelError(f"{self.path}: {self.architecture}.{option} = {brief(value)} is not supported")

    # --- configuration ------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The metadata as the contents of a ``config.json``. Raises ModelError if tensors have other shapes."""
        own = self.architecture + "."
        heads = self._size(own + "attention.head_count")
        hidden = self._size(own + "embedding_length")
        kv_heads = self._size(own + "attention.head_count_kv", heads)
        head_dim = self._size(own + "attention.key_length", hidden // heads)
        inner = self._size(own + "feed_forward_length")
        layers = self._size(own + "block_count")
        if self._size(own + "attention.value_length", head_dim) != head_dim:
            raise ModelError(
                f"{self.path}: values of another size than keys ({own}attention.value_length) are not supported"
            )
        tokens = self.get_list("tokenizer.ggml.tokens", str)
        embedding = self.tensors.get("token_embd.weight")
        vocab_size = self._size(own + "vocab_size", len(tokens) or (embedding.shape[0] if embedding else 1))
        # A network's size depends on these sizes and the number of layers alone, so none can exceed the file's.
        self._expect("token_embd.weight", (vocab_size, hidden))
        self._expect("blk.0.attn_q.weight", (heads * head_dim, hidden))
        self._expect("blk.0.attn_k.weight", (kv_heads * head_dim, hidden))
        self._expect("blk.0.ffn_gate.weight", (inner, hidden))
        if 9 * layers > len(self.tensors):  # a layer has at least nine
            raise ModelError(f"{self.path}: {own}block_count is {layers}, but the file has {len(self.tensors)} tensors")
        if len(tokens) > vocab_size:
            raise ModelError(f"{self.path} has {len(tokens)} tokens, but embeddings of {vocab_size}")
        plain = all(TYPES[info.type][0] == "F32" for info in self.tensors.values())
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._size(own + "context_length"),
            "rms_norm_eps": self.get(own + "attention.layer_norm_rms_epsilon", float),
            "rope_parameters": self._rope(own, head_dim),
            "attention_bias": self.architecture != "qwen2" and "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "eos_token_id": self._eos_token_ids(tokens),
            "dtype": "float32" if plain else "bfloat16",
        }

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, ... if default is None else default)
        if value < 1:
            raise ModelError(f"{self.path}: {key} must be at least 1, not {value}")
        return value

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path} lacks tensor {name!r}")
        if info.shape != shape:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {list(info.shape)}, but the metadata imply {list(shape)}"
            )

    def _rope(self, own: str, head_dim: int) -> dict[str, Any]:
        """``rope_parameters``. Files of Llama 3 have its scaling as a tensor of divisors, `ROPE_FREQS`."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.get(own + "rope.freq_base", float, 10_000.0)}
        rope["partial_rotary_factor"] = self._size(own + "rope.dimension_count", head_dim) / head_dim
        old = self.get(own + "rope.scale_linear", float, 1.0)  # the key of old files
        kind = self.get(own + "rope.scaling.type", str, "none" if old == 1.0 else "linear")
        if ROPE_FREQS in self.tensors:
            if kind != "none":
                raise ModelError(
                    f"{self.path}: {own}rope.scaling.type = {brief(kind)} with {ROPE_FREQS} is not supported"
                )
            self._expect(ROPE_FREQS, (head_dim // 2,))
            divisors = torch.empty(head_dim // 2)
            with open(self.path, "rb") as file:
                read_into(file, self.tensors[ROPE_FREQS], divisors)
            if not (divisors.isfinite() & (divisors > 0)).all():
                raise ModelError(f"{self.path}: {ROPE_FREQS} must hold positive numbers")
            return rope | {"rope_type": "llama3", "divisors": divisors.tolist()}
        if kind != "none":
            rope |= {"rope_type": kind, "factor": self.get(own + "rope.scaling.factor", float, old)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self._size(own + "rope.scaling.original_context_length")
            stated = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
            rope |= {name: self.get(own + key, float) for name, key in stated.items() if own + key in self.metadata}
            by = self.get(own + "rope.scaling.attn_factor", float, 1.0)
            if by != 1.0:  # llama.cpp multiplies by it what Hugging Face's attention_factor replaces
                rope["attention_factor"] = by * (0.1 * math.log(max(rope["factor"], 1.0)) + 1)
        return rope

    def _eos_token_ids(self, tokens: list[str]) -> list[int]:
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        ids = {self.token_id(key, tokens) for key in keys} - {None}
        template = self.get("tokenizer.chat_template", str, "")
        if written := [token for token in END_OF_TURN if token in template]:
            types = self.get_list("tokenizer.ggml.token_type", int, len(tokens))
            ids |= {i for i, kind in enumerate(types) if kind == CONTROL and tokens[i] in written}
        return sorted(i for i in ids if i is not None)

    def token_id(self, key: str, tokens: list[str]) -> int | None:
        """A token's id in the metadata; ``None`` if it is missing. Raises ModelError if there is no such token."""
        value = self.get(key, int, None)
        if value is not None and tokens and not 0 <= value < len(tokens):
            raise ModelError(f"{self.path}: {key} is {value}, but the file has {len(tokens)} tokens")
        return value

    # --- weights ------------------------------------------------------------------------------------------------------

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises ModelError unless the file holds exactly a network's tensors. ``shapes``: by Hugging Face's names."""
        expected = {gguf_name(name): tuple(shape) for name, shape in shapes.items()}
        for name, shape in expected.items():
            self._expect(name, shape)
        if further := sorted(self.tensors.keys() - expected.keys() - {ROPE_FREQS}):
            raise ModelError(f"{self.path}: tensor {brief(further[0])} is not part of this architecture")

    def load(self, network: Any, shard: Any = None, progress: Callable[[int], Any] = lambda num_bytes: None) -> None:
        """Dequantises the tensors into the parameters of a network, or into those of one rank's shard of it.

        ``progress`` is called with the size of each tensor that was read, in bytes.
        """
        places = [(self.tensors[gguf_name(name)], name, place) for name, place in network.checkpoint_views()]
        with open(self.path, "rb") as file:
            for info, name, place in sorted(places, key=lambda one: one[0].offset):  # from front to back
                whole = place if shard is None else torch.empty(info.shape, dtype=place.dtype)
                read_into(file, info, whole)
                if self.architecture == "llama" and ".attn_q." in info.name:
                    _to_halves(whole, self.metadata["llama.attention.head_count"])
                elif self.architecture == "llama" and ".attn_k." in info.name:
                    heads = self.metadata["llama.attention.head_count"]
                    _to_halves(whole, self.metadata.get("llama.attention.head_count_kv", heads))
                if whole is not place:
                    place.copy_(shard.part(name, whole, place.shape))
                progress(info.num_bytes)


def read_into(file: BinaryIO, info: TensorInfo, place: Tensor) -> None:
    """Dequantises a tensor in pieces, so that what is not yet in ``place``, in its dtype, is small."""
    quants = _package()
    _, values, size = TYPES[info.type]
    columns = info.shape[-1]
    rows = place.view(-1, columns)
    step = max(1, PIECE // columns)
    file.seek(info.offset)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        raw = np.fromfile(file, np.uint8, piece.numel() // values * size)
        if len(raw) < piece.numel() // values * size:
            raise ModelError(f"{file.name} has become shorter while it was read")
        # As one long row: the package takes 16 rows at a time, which for short rows is five times as slow.
        wide = quants.dequantize(raw[None], quants.GGMLQuantizationType(info.type))
        piece.copy_(torch.from_numpy(wide).view(piece.shape))


def _to_halves(weight: Tensor, heads: int) -> None:
    """Reorders a projection's rows: llama.cpp rotates neighbouring channels, Hugging Face those half a head apart."""
    order = torch.arange(len(weight), device=weight.device).view(heads, -1, 2).transpose(1, 2).flatten()
    weight.copy_(weight[order])


def _package() -> Any:
    """The package's module of quantized types."""
    try:
        from gguf import quants
    except ImportError as error:
        raise ModelError(f"a GGUF file needs the package gguf ({error}); install it with: pip install gguf") from None
    return quants


def _type_name(kind: int) -> str:
    try:
        return _package().GGMLQuantizationType(kind).name
    except ValueError:
        return str(kind)
