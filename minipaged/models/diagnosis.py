"""Says why a directory is not a model that minipaged reads: what it holds instead, or what its download lacks.

Only called once something is missing, to find the cause that a user can do something about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

READS = "minipaged reads model.safetensors or its shards; transformers' save_pretrained writes them"
# Other formats of weights: pattern → what such a file is.
OTHER_WEIGHTS = {
    "adapter_model.*": "a LoRA adapter: merge it into its base model with peft",
    "*.bin": "a pickle, which can run code when read",
    "*.pth": "a pickle, which can run code when read",
    "*.pt": "a pickle, which can run code when read",
    "*.ckpt*": "a TensorFlow or PyTorch checkpoint",
    "*.h5": "TensorFlow's format",
    "*.msgpack": "Flax's format",
    "*.onnx": "ONNX",
    "*.gguf": "GGUF; give that file instead of the directory",
    "*.safetensors": "a file of another name",
}
QUANTIZED = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".SCB", ".absmax",
             ".input_scale", ".scales", ".biases")  # fmt: skip
# Files of quantizers that leave config.json as it is: old GPTQ and AWQ, NVIDIA's ModelOpt.
QUANTIZERS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
AGAIN = "; copy or download it again"
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package → module
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def without_config(directory: Path) -> str:
    """Why a directory without config.json is not a model."""
    if (directory / "adapter_config.json").exists():
        base = _read(directory / "adapter_config.json").get("base_model_name_or_path") or "the base model"
        return (
            f"{directory} holds a LoRA adapter, not a whole model. Merge it into its base model ({base}) with peft: "
            "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…); give that directory"
        )
    nested = sorted(path.parent for path in _find(directory, "*/config.json", "snapshots/*/config.json"))
    if nested:
        return f"{directory} holds no config.json, but {nested[0]} does; give that directory"
    held = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if ggufs := [name for name in held if name.endswith(".gguf")]:
        return f"{directory} holds no config.json; to load {ggufs[0]}, give its path"
    if any(name.startswith("consolidated.") for name in held):
        return f"{directory} holds weights in the format of Meta or Mistral; give a directory in Hugging Face format"
    listed = f"only {', '.join(held[:3])}{' and others' if len(held) > 3 else ''}" if held else "nothing: it is empty"
    return (
        f"{directory} holds no config.json: not a model in Hugging Face format (it holds {listed}){_cut_off(directory)}"
    )


def without_weights(directory: Path) -> str:
    """Why a directory with a config.json has no weights that minipaged reads."""
    if (directory / "adapter_config.json").exists():
        return without_config(directory)
    link = directory / "model.safetensors"
    if link.is_symlink():
        return f"{link} is a link to a file that is not there{_cut_off(directory) or AGAIN}"
    if shards := sorted(directory.glob("model-*-of-*.safetensors")):
        index = "model.safetensors.index.json, which names all shards"
        return f"{directory} holds {shards[0].name}, but not {index}{_cut_off(directory) or AGAIN}"
    for pattern, what in OTHER_WEIGHTS.items():
        # The settings of a trainer are pickled, too, and are no weights.
        others = [path.name for path in directory.glob(pattern) if path.name != "training_args.bin"]
        if others:
            return f"{directory} holds only {min(others)}, {what}. {READS}{_cut_off(directory)}"
    return f"{directory} holds no weights. {READS}{_cut_off(directory)}"


def without_shards(index: Path, missing: list[Path], total: int, example: str) -> str:
    """What to say if files that the index names are not there."""
    more = f" (and {len(missing) - 1} more of {total})" if len(missing) > 1 else ""
    return (
        f"{missing[0]} is missing{more}; {index.name} says that it holds {example!r} and others"
        f"{_cut_off(index.parent) or AGAIN}"
    )


def without_tensors(directory: Path, missing: set[str]) -> str:
    """What to say if the files lack tensors of the model."""
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    tied = '; if its head is the token embedding, config.json must say "tie_word_embeddings": true'
    hint = tied if missing == {"lm_head.weight"} else ""
    return f"{directory}: the checkpoint lacks tensor {min(missing)!r}{more}{hint}"


def strange_tensors(file: Path, names: list[str]) -> str:
    """What to say of tensors that the model does not have."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    hint = ""
    if any("lora_" in name for name in names):
        hint = "; it is of a LoRA adapter, which must be merged into its base model with peft first"
    elif any(name.endswith(QUANTIZED) for name in names):
        hint = "; it is of quantized weights, which are not supported"
    return f"{file}: tensor {names[0]!r}{more} is not part of this architecture, or occurs twice{hint}"


def damaged(file: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read: cut off, a Git LFS pointer, empty, or something else."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            start = content.read(8)
            if start == b"version ":
                return f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` in its directory"
            header_size = int.from_bytes(start, "little")
            header = json.loads(content.read(header_size)) if len(start) == 8 and header_size < size else {}
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return f"{file} is damaged, or not a safetensors file; download it again ({error})"
    if header and size < expected:
        return f"{file} is damaged: it ends after {size:,} of {expected:,} bytes{_cut_off(file.parent) or AGAIN}"
    what = "is damaged: it is empty" if size == 0 else "is damaged, or not a safetensors file"
    return f"{file} {what}; download it again ({error})"


def quantized(config: dict[str, Any], directory: Path) -> str | None:
    """Why quantized weights cannot be read; ``None`` if they are not quantized."""
    given = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    for name, method in QUANTIZERS.items():
        if not given and (directory / name).exists():
            given = {"quant_method": method} | _read(directory / name)
    if not given:
        return None
    about = given if isinstance(given, dict) else {}
    of_old_files = "bitsandbytes" if about.get("load_in_4bit") or about.get("load_in_8bit") else "unknown method"
    method = about.get("quant_method") or of_old_files
    bits = about.get("bits") or about.get("w_bit") or (4 if about.get("load_in_4bit") else None)
    return (
        f"{directory}: the weights are quantized ({method}{f', {bits} bits' if bits else ''}; quantization_config), "
        "which is not supported; give the original checkpoint in bfloat16, float16 or float32"
    )


def unreadable_tokenizer(directory: Path, error: Exception | None = None) -> str | None:
    """Why the tokenizer cannot be read. Without ``error``: if that is known before trying, else ``None``."""
    held = [name for name in VOCABULARIES if (directory / name).exists()]
    if not held:
        return (
            f"{directory} holds a tokenizer_config.json, but no vocabulary (tokenizer.json, or tokenizer.model, or "
            f"vocab.json and merges.txt){_cut_off(directory) or '; copy the files of the tokenizer there, too'}"
        )
    if held[0] == "tokenizer.model":
        missing = [package for package, module in SENTENCEPIECE.items() if not _installed(module)]
        if missing:
            return (
                f"{directory} holds its tokenizer only as tokenizer.model (SentencePiece). To read it, transformers "
                f"needs packages that are not installed: pip install {' '.join(missing)}"
            )
        if error is not None:
            return f"{directory / held[0]} cannot be read as a SentencePiece model; download it again ({_line(error)})"
    if held == ["vocab.json"] and not (directory / "merges.txt").exists():
        return (
            f"{directory} holds vocab.json, but no merges.txt beside it, so the tokenizer cannot be read"
            f"{_cut_off(directory) or AGAIN}"
        )
    return None if error is None else f"the tokenizer in {directory} cannot be read: {_line(error)}"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name, the parent is missing
        return False


def _cut_off(directory: Path) -> str:
    """What to do if the directory is a download that was not completed; empty if it does not look like one."""
    resolved = directory.resolve()
    hub = resolved.parent.parent if resolved.parent.name == "snapshots" else None  # …/models--owner--name/snapshots/…
    if hub is not None and hub.name.startswith("models--"):
        name = hub.name.removeprefix("models--").replace("--", "/")
        return (
            f". This is what the cache of the hub has of {name}; if its download was cut off, run `hf download {name}`"
        )
    if any(_find(directory, "*.incomplete", ".cache/huggingface/download/*.incomplete")):
        return ". Its download was not completed (there are *.incomplete files); run the same download again"
    return ""


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _find(directory: Path, *patterns: str) -> Iterable[Path]:
    return (path for pattern in patterns for path in directory.glob(pattern))


def _read(path: Path) -> dict[str, Any]:
    """An object in JSON; empty if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
