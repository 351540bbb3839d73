"""Loads a model by name: finds its directory, reads ``config.json``, loads and checks every tensor."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minipaged.errors import ModelError
from minipaged.models import diagnosis, sampling_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minipaged.models.gguf import GGUFFile

log = logging.getLogger(__name__)

# Architecture → module, network class and configuration class. The module is imported when a model is loaded.
ARCHITECTURES: dict[str, tuple[str, str, str]] = {
    "GPT2LMHeadModel": ("minipaged.models.gpt2", "GPT2", "GPT2Config"),
    "LlamaForCausalLM": ("minipaged.models.llama", "Llama", "LlamaConfig"),
    "MistralForCausalLM": ("minipaged.models.llama", "Llama", "LlamaConfig"),
    "Qwen2ForCausalLM": ("minipaged.models.llama", "Llama", "LlamaConfig"),
    "Qwen3ForCausalLM": ("minipaged.models.llama", "Llama", "LlamaConfig"),
}
Families = Mapping[str, tuple[type, type]]  # architecture → (network class, configuration class)

# Only the files that are read: many repositories hold the same weights several times, in other formats.
DOWNLOADED = ["*.json", "model*.safetensors", "*.model", "merges.txt", "vocab.txt", "*.jinja"]

# Masks and tables that old checkpoints contain besides the weights; the models compute them, so they are skipped.
COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

LARGE = 50_000_000  # parameters; for smaller models a CPU is as fast in float32, one request at a time

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """The properties of a model that the engine needs; for a shard, the numbers of heads are its own.

    Attributes:
        max_model_len: maximum number of tokens in a sequence, prompt included.
        eos_token_ids: every token that ends a sequence; may be empty.
        sliding_window: the window if *all* layers have one, the largest of them: older KV is never read again.
            ``None`` if any layer has none.
        dynamic_after: with dynamic RoPE, the tokens after which a token's key depends on its prompt's length.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    sliding_window: int | None
    dynamic_after: int | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model, or one rank's shard of it, with its weights, and its tokenizer if the directory holds one."""

    model: nn.Module  # (batch, kv_cache) → logits [R, V] float32
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase | None
    directory: Path  # or the GGUF file
    device: torch.device
    dtype: torch.dtype
    shard: Any = None  # a features.tensor_parallel Shard; None: the whole model
    generation_config: dict[str, Any] | None = None  # what generation_config.json holds; None: there is no such file


def load_model(
    model: str, device: str = "auto", dtype: str = "auto", shard: Any = None, families: Families | None = None
) -> LoadedModel:
    """Finds, reads and checks a model.

    Args:
        model: ``"tiny"``, a directory in Hugging Face format, a GGUF file, or a hub id.
        device: ``"auto"`` uses CUDA if there is a CUDA device, else the CPU.
        dtype: one of `DTYPES`, or ``"auto"``: the dtype in ``config.json``; on a CPU float32, except for `LARGE` models
            stored in bfloat16 if the CPU computes bfloat16 in hardware.
        shard: read only this process's part of the model; ``None``: all of it.
        families: further architectures, besides `ARCHITECTURES`.

    Raises ModelError, which says what to do, if the model cannot be found or read or is not supported.
    """
    where = device_of(device)
    directory = resolve(model)
    file = _gguf_file(directory) if directory.is_file() else None
    config = _read_json(directory / "config.json") if file is None else file.config()
    generation_config = _generation_config(directory)
    architecture, network_class, config_class = _architecture(config, directory, families or {})
    try:
        read = config_class.from_config(config, architecture)
    except ModelError as error:
        # A GGUF file has no config.json; the message should name what there is.
        raise ModelError(str(error).replace("config.json", str(directory)) if file else str(error)) from None
    with torch.device("meta"):  # shapes without memory: initialising random weights would take minutes
        whole = network_class(read)
        network = whole if shard is None else network_class(shard.config(whole.config))
    shapes = {name: place.shape for name, place in whole.checkpoint_views()}
    what = _dtype(dtype, where, config, sum(parameter.numel() for parameter in whole.parameters()))
    if file is not None:
        file.check(shapes)
    try:
        _allocate(network, where, what)
    except RuntimeError as error:
        size = sum(parameter.numel() for parameter in network.parameters()) * what.itemsize
        raise ModelError(f"{directory}: its weights, {size / 1e9:,.1f} GB, do not fit into {where} memory") from error
    if file is None:
        _load_weights(network, directory, shapes, shard)
    else:
        with _progress_bar(directory, [directory], shard) as bar:
            file.load(network, shard, bar.update)
    if shard is not None:
        shard.join(network)
    tokenizer = None if shard and shard.rank else _load_tokenizer(directory, file)  # other ranks handle no text
    eos_token_ids = _eos_token_ids(directory, generation_config, config, tokenizer, network.config.vocab_size)
    spec = _spec(architecture, network.config, eos_token_ids)
    return LoadedModel(network.eval(), spec, tokenizer, directory, where, what, shard, generation_config)


# --- where --------------------------------------------------------------------------------------------------


def resolve(model: str) -> Path:
    """The directory of a model, or its GGUF file. A hub id (``owner/name``) is downloaded, or found in the hub's cache.

    Anything that looks like a path is treated as one: a misspelt directory must not cause a request to the internet.
    Raises ModelError.
    """
    if model == "tiny":
        from minipaged.tiny import WEIGHTS

        return Path(WEIGHTS)
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.exists():
        if path.is_file() and (model.endswith(".gguf") or _begins_as_gguf(path)):
            return path
        raise ModelError(
            f"{model!r} is a file, but no GGUF file; give the directory that holds config.json and the weights"
        )
    if model.endswith(".gguf"):
        raise ModelError(f"there is no file {model!r}")
    if model.startswith((".", "/", "~")) or "\\" in model or model.count("/") != 1:
        raise ModelError(
            f"there is no directory {model!r}. A model is 'tiny' (the embedded one), a directory with config.json "
            "and model.safetensors, a GGUF file, or a hub id, owner/name, such as 'HuggingFaceTB/SmolLM2-135M'"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's client raises a dozen types without a common base
        reason = f"{type(error).__name__}: {error}".splitlines()[0].encode("utf-8", "backslashreplace").decode()
        raise ModelError(
            f"there is no directory {model!r}, and no model of that name from the Hugging Face hub ({reason}). "
            "Check the spelling and the network, run `hf auth login` for a gated model, or give a directory"
        ) from error


def _begins_as_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _gguf_file(path: Path) -> GGUFFile:
    from minipaged.models.gguf import GGUFFile  # needs a package that most users do not have

    return GGUFFile(path)


def device_of(name: str) -> torch.device:
    """The torch device for ``EngineConfig.device``. Raises ModelError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device must be auto, cpu, cuda or mps, not {name!r}") from None
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= present:
        raise ModelError(f"device {name!r} is not present on this machine; use device='auto'")
    return device


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16), and torch may use that."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dtype(name: str, device: torch.device, config: dict[str, Any], num_parameters: int) -> torch.dtype:
    if name == "auto":
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
        if device.type == "cpu":
            # Most CPUs compute bfloat16 slowly, and for a small model float32 costs little and is more precise.
            fast = name == "bfloat16" and num_parameters >= LARGE and computes_bfloat16()
            name = "bfloat16" if fast else "float32"
            logging.getLogger(__name__).info("dtype='auto' is %s on this CPU", name)
    if name not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


# --- what ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(diagnosis.without_config(path.parent)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object with named fields")
    return content


def _architecture(config: dict[str, Any], directory: Path, families: Families) -> tuple[str, Any, Any]:
    """The architecture's name, its network class and its configuration class."""
    named = config.get("architectures") or [f"model_type {config.get('model_type')!r} without architectures"]
    named = [str(one) for one in named] if isinstance(named, list) else [str(named)]
    if named[0] not in families and named[0] not in ARCHITECTURES:
        supported = ", ".join([*ARCHITECTURES, *families])
        raise ModelError(f"{directory / 'config.json'}: {named[0]} is not supported. Supported: {supported}")
    if why := diagnosis.quantized(config, directory):
        raise ModelError(why)
    if named[0] in families:
        return named[0], *families[named[0]]
    module, network, its_config = ARCHITECTURES[named[0]]
    return named[0], getattr(import_module(module), network), getattr(import_module(module), its_config)


def _spec(architecture: str, config: Any, eos_token_ids: frozenset[int]) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_model_len=config.max_model_len,
        eos_token_ids=eos_token_ids,
        sliding_window=None if None in config.windows else max(w for w in config.windows if w is not None),
        dynamic_after=config.rope.dynamic_after if hasattr(config, "rope") else None,
    )


def _generation_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "generation_config.json"
    if not path.exists():
        return None
    generation_config = _read_json(path)
    sampling_defaults.check(generation_config, path)
    return generation_config


def _eos_token_ids(
    directory: Path, generation: dict[str, Any] | None, config: dict[str, Any], tokenizer: Any, vocab_size: int
) -> frozenset[int]:
    """Every token that ends a sequence. Warns of those beyond the vocabulary, which the model cannot generate: a GPT-2
    trained with fewer tokens often states 50256, the default. Raises `ModelError` for what is no token id."""
    # A chat model ends a turn and a document with different tokens; often only generation_config.json lists both.
    path, stated = directory / "generation_config.json", (generation or {}).get("eos_token_id")
    if stated is None:
        path = directory if directory.is_file() else directory / "config.json"
        stated = config.get("eos_token_id")
    named = [(token, str(path)) for token in (stated if isinstance(stated, list) else [stated])]
    named.append((getattr(tokenizer, "eos_token_id", None), f"the tokenizer in {directory}"))
    ids = set()
    for token, where in named:
        if token is None:
            continue
        if type(token) is not int:
            raise ModelError(f"{where}: the eos_token_id {token!r} is not a token id, a whole number; correct it there")
        if 0 <= token < vocab_size:
            ids.add(token)
        else:
            log.warning(
                "%s: the eos_token_id %d is beyond the model's %d tokens and never ends a text; correct it there",
                where, token, vocab_size,
            )  # fmt: skip
    return frozenset(ids)


def _load_tokenizer(directory: Path, file: GGUFFile | None) -> PreTrainedTokenizerBase | None:
    if file is not None:
        from minipaged.text.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(file)
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    if why := diagnosis.unreadable_tokenizer(directory):  # transformers would make an empty tokenizer of some of these
        raise ModelError(why)
    from transformers import AutoTokenizer, PreTrainedConfig  # takes seconds to import, and is needed only here

    try:
        known = {}
        path = directory / "tokenizer_config.json"
        about = _read_json(path) if path.exists() else {}
        if about.get("tokenizer_class") and "auto_map" not in about:
            # The tokenizer's class follows from this name and the model's type. Without a configuration, transformers
            # imports the model's own class of them, and with it all that generates text: 1.5 seconds.
            config = _read_json(directory / "config.json")
            names = ("model_type", "model_name", "tokenizer_class")
            known["config"] = PreTrainedConfig.from_dict({name: config[name] for name in names if name in config})
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **known)
    except Exception as error:  # a damaged tokenizer file can make its parser raise anything
        raise ModelError(diagnosis.unreadable_tokenizer(directory, error)) from error


# --- weights ------------------------------------------------------------------------------------------------

HEAD = "lm_head.weight"
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of weights that are not quantized
PATIENCE = 2.0  # seconds of loading without a word
LARGE_PAGE = 2 << 20  # bytes in a huge page, on most CPUs


def _allocate(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Allocates memory for parameters on the meta device. Buffers keep their dtype and are only moved."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, device=device, dtype=dtype)  # empty_like would import sympy: a second
            if device.type == "cpu" and empty.nbytes >= LARGE_PAGE:
                # Every step reads all weights and looks up each page. Linux may refuse: a few percent slower.
                _advise(empty, "MADV_HUGEPAGE")
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    network.to(device)


def _advise(tensor: Tensor, advice: str) -> None:
    """Tells the system how a tensor's memory will be used: ``advice`` is a name of the mmap module."""
    if (number := getattr(mmap, advice, None)) is not None:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), number)


def _load_weights(network: Any, directory: Path, shapes: dict[str, torch.Size], shard: Any) -> None:
    """Copies the checkpoint's tensors into the parameters, one by one, so that the weights are never in memory twice.

    ``shapes``: the shapes of the whole tensors, even if a shard takes only a part of them.
    """
    places, files = dict(network.checkpoint_views()), _weight_files(directory)
    head = ""  # the name of the embedding, if it is also the head: checkpoints hold it under either name, or both
    if network.config.tied:
        head = next(name for name, parameter in network.named_parameters() if parameter is network.lm_head.weight)
    _check_names(directory, files, network.PREFIX, {*places}, head)
    filled = set()
    for file, name, tensor in _followed(_tensors(files), directory, files, shard):
        name = name.removeprefix(network.PREFIX)
        target = head if head and name == HEAD else name
        if target not in places:  # computed by the model
            continue
        place = places[target]
        if tensor.shape != shapes[target]:
            wanted = f"config.json implies {list(shapes[target])}"
            raise ModelError(f"{file}: tensor {name!r} has shape {list(tensor.shape)}, but {wanted}")
        if tensor.dtype not in STORED:
            what = f"{str(tensor.dtype).removeprefix('torch.')}, as in quantized checkpoints"
            raise ModelError(f"{file}: tensor {name!r} is stored as {what}; give one in bfloat16, float16 or float32")
        if target not in filled:
            place.copy_(tensor if shard is None else shard.part(target, tensor, place.shape))
        elif not torch.equal(tensor.to(place), place):
            raise ModelError(
                f"{directory}: config.json ties the head to the token embedding (tie_word_embeddings), but the "
                f"checkpoint's tensor {HEAD!r} differs from it"
            )
        filled.add(target)


def _check_names(directory: Path, files: list[Path], prefix: str, wanted: set[str], head: str) -> None:
    """Raises ModelError, before any weight is read, if the checkpoint has other tensors than the model, or lacks some.

    ``head``: the name of the embedding, if that is the head, too.
    """
    found: set[str] = set()
    known = wanted | {HEAD} if head else wanted
    for file in files:
        strange = []
        for name in _names(file):
            name = name.removeprefix(prefix)
            if name in found or name not in known and not f".{name}".endswith(COMPUTED):
                strange.append(name)
            found.add(name)
        if strange:
            raise ModelError(diagnosis.strange_tensors(file, strange))
    if missing := wanted - found - ({head} if HEAD in found else set()):
        raise ModelError(diagnosis.without_tensors(directory, missing))


def _names(file: Path) -> list[str]:
    with _opened(file) as tensors:
        return list(tensors.keys())


def _progress_bar(model: Path, files: list[Path], shard: Any) -> Any:
    """Shows on stderr how many of the files' bytes are read, if it takes longer than `PATIENCE`; only rank 0 does."""
    from tqdm import tqdm

    size, quiet = sum(file.stat().st_size for file in files), bool(shard and shard.rank)
    desc = f"loading {model.name}"
    return tqdm(desc=desc, total=size, unit="B", unit_scale=True, delay=PATIENCE, leave=False, disable=quiet)


def _followed(
    tensors: Iterator[tuple[Path, str, Tensor]], directory: Path, files: list[Path], shard: Any
) -> Iterator[tuple[Path, str, Tensor]]:
    """Yields the same, and shows the progress."""
    with _progress_bar(directory, files, shard) as bar:
        for file, name, tensor in tensors:
            yield file, name, tensor
            bar.update(tensor.nbytes)
            # The tensor is a part of the file in memory. Its pages are no longer needed; they would count like a
            # second copy of the weights.
            _advise(tensor, "MADV_DONTNEED")


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """Yields (file, name, tensor) for every tensor of the checkpoint, and reads one tensor at a time."""
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                yield file, name, tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(diagnosis.damaged(file, error)) from None


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.exists():
        raise ModelError(diagnosis.without_weights(directory))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} has no weight_map, so the files of the weights are unknown; download it again")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        lost = min(name for name, shard in weight_map.items() if directory / shard == missing[0])
        raise ModelError(diagnosis.without_shards(index, missing, len(files), lost))
    return files
