"""What the loader finds, reads and rejects. Every rejection is a ModelError that names the cause."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from minipaged.errors import ModelError
from minipaged.models.gpt2 import GPT2Config
from minipaged.models.layers import Rope
from minipaged.models.llama import LlamaConfig
from minipaged.models.loader import load_model, resolve
from tests.checkpoints import save_llama
from tests.models.families import LLAMA3_ROPE, config_of

PICKED = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A function that copies a family's checkpoint, so that a test can damage it."""

    def make(family: str = "llama2") -> Path:
        return Path(shutil.copytree(checkpoint(family), tmp_path / family))

    return make


def edit_config(directory: Path, drop: str | None = None, **changes) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    config.pop(drop, None)
    path.write_text(json.dumps(config))
    return directory


def edit_weights(directory: Path, change) -> Path:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return directory


def refused(directory: Path | str, match: str, **options) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        load_model(str(directory), **{"device": "cpu"} | options)
    assert "\n" not in str(caught.value)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(str(directory), "cpu").model.state_dict()


def same_weights(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- loaded models --------------------------------------------------------------------------------


def test_spec(checkpoint):
    spec = load_model(str(checkpoint("mistral")), "cpu").spec
    assert (spec.architecture, spec.vocab_size, spec.num_layers) == ("MistralForCausalLM", 131, 3)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_model_len) == (4, 2, 16, 128)
    assert spec.sliding_window == 5
    # One layer with full attention needs every token's KV.
    assert load_model(str(checkpoint("qwen2-window")), "cpu").spec.sliding_window is None


def test_model_is_frozen_and_on_its_device(checkpoint):
    loaded = load_model(str(checkpoint("smollm2")), "auto", "auto")
    on_cuda = torch.cuda.is_available()
    assert loaded.device.type == ("cuda" if on_cuda else "cpu") and not loaded.model.training
    assert all(p.device.type == loaded.device.type and not p.requires_grad for p in loaded.model.parameters())
    assert all(b.device.type == loaded.device.type for b in loaded.model.buffers())
    if not on_cuda:
        assert loaded.dtype == torch.float32


def test_a_bfloat16_checkpoint_is_widened_on_a_cpu(checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama3"), dtype="bfloat16")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "cpu")
    assert loaded.dtype == torch.float32
    rotary = load_model(str(tmp_path), "cpu", "bfloat16").model.get_submodule("rotary")
    assert all(buffer.dtype == torch.float32 for buffer in rotary.buffers())


def test_eos_token_ids_come_from_all_three_files(copy):
    directory = copy()
    (directory / "generation_config.json").unlink()
    assert load_model(str(edit_config(directory, eos_token_id=[5, 6])), "cpu").spec.eos_token_ids == {5, 6}
    assert load_model(str(edit_config(directory, eos_token_id=None)), "cpu").spec.eos_token_ids == set()
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 9}, unk_token="<s>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
    loaded = load_model(str(edit_config(directory, eos_token_id=5)), "cpu")
    assert loaded.spec.eos_token_ids == {7, 8, 9}
    assert loaded.tokenizer is not None and loaded.tokenizer.decode([9]) == "</s>"


@pytest.mark.parametrize("wrong", ["2", [3, "</s>"], True, 2.0, {"id": 2}], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_eos_token_that_is_no_token_id_is_named(copy, name, wrong):
    with pytest.raises(ModelError, match=f"{name}: the eos_token_id .* is not a token id, a whole number"):
        load_model(str(with_eos(copy(), name, wrong)), "cpu")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_eos_token_beyond_the_vocabulary_is_named_and_the_others_count(copy, name, caplog):
    loaded = load_model(str(with_eos(copy(), name, [3, 10**6, -1])), "cpu")
    assert loaded.spec.eos_token_ids == {3}
    said = [record.getMessage() for record in caplog.records]
    assert [f"{name}: the eos_token_id {token} is beyond" in one for token, one in zip((10**6, -1), said, strict=True)]


def with_eos(directory, name, value):
    """Writes ``eos_token_id`` into one of the two files; the other has none."""
    edit_config(directory, eos_token_id=value if name == "config.json" else None)
    stated = {"eos_token_id": value} if name == "generation_config.json" else {}
    (directory / "generation_config.json").write_text(json.dumps(stated))
    return directory


def test_an_eos_token_of_the_tokenizer_beyond_the_vocabulary_is_named(copy, caplog):
    directory = with_eos(copy(), "config.json", 5)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 100_000}, unk_token="<s>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
    assert load_model(str(directory), "cpu").spec.eos_token_ids == {5}
    assert "the tokenizer in" in caplog.text and "100000" in caplog.text


def test_a_directory_without_a_tokenizer_has_none(checkpoint):
    assert load_model(str(checkpoint("gpt2")), "cpu").tokenizer is None


def test_import_leaves_transformers_alone():
    program = "import sys, minipaged.models.loader; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- ways to write the same checkpoint ------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama2", "qwen3"])
def test_shards(family, checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_weights(tmp_path, checkpoint(family))


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("smollm2", "model.")])
def test_names_without_prefix_and_computed_tensors(family, prefix, copy, checkpoint):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        extra = ["h.0.attn.bias", "h.1.attn.masked_bias", "layers.0.self_attn.rotary_emb.inv_freq"]
        tensors.update({name: torch.ones(3) for name in extra})

    assert same_weights(edit_weights(copy(family), change), checkpoint(family))


def test_fused_projections_hold_their_parts_in_order(checkpoint):
    stored = load_file(checkpoint("qwen2") / "model.safetensors")
    mine = weights(checkpoint("qwen2"))
    for kind in ("weight", "bias"):
        parts = [stored[f"model.layers.2.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(mine[f"layers.2.self_attn.qkv_proj.{kind}"], torch.cat(parts))


def test_a_tied_head_that_is_stored_too(copy, checkpoint):
    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    directory = copy("smollm2")
    assert same_weights(edit_weights(directory, same), checkpoint("smollm2"))
    refused(edit_weights(directory, other), "lm_head.weight.*differs")


@pytest.mark.parametrize(
    "family_and_old",
    [
        ("llama3", {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}),
        ("llama-linear", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("qwen2", {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float32"}),
    ],
)
def test_rope_as_older_configs_write_it(family_and_old):
    family, old = family_and_old
    new = config_of(family).to_dict()
    assert Rope.from_config(new) == Rope.from_config({k: v for k, v in new.items() if k != "rope_parameters"} | old)


# --- finding a model ------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: records requests, and fails like the hub without a network."""
    asked: list[str] = []

    def snapshot_download(model, **options):
        asked.append(model)
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub.\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("path", ["./a/b", "/no/where", "~/no", "../x", "a/b/c", "nothing", ".", "a/b/"])
def test_paths_never_reach_the_hub(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(path, "holds no config.json" if path == "." else "there is no directory")
    assert hub == []


def test_a_hub_id_without_network(hub):
    refused("owner/name", "no directory 'owner/name'.*hub.*cannot reach the hub.*network")
    assert hub == ["owner/name"]


def test_a_hub_id_that_is_served(checkpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **options: str(checkpoint("gpt2")))
    assert load_model("owner/name", "cpu").directory == checkpoint("gpt2")


def test_an_existing_directory_wins_over_the_hub(hub, checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint("gpt2"), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name") and hub == []


def test_a_file_is_not_a_model(checkpoint):
    refused(checkpoint("gpt2") / "model.safetensors", "is a file")


# --- rejected: settings ---------------------------------------------------------------------------


def test_devices_and_dtypes(checkpoint):
    for device in ["cuda", "mps", "cuda:7"]:
        if not (device == "cuda" and torch.cuda.is_available()):
            refused(checkpoint("gpt2"), f"'{device}' is not present", device=device)
    refused(checkpoint("gpt2"), "device must be", device="toaster")
    refused(checkpoint("gpt2"), "dtype must be.*'int8'", dtype="int8")


# --- rejected: config.json ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("llama2", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported.*Qwen3"),
        ("llama2", {"architectures": None, "model_type": "bert"}, "bert.*not supported"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama2", {"attention_bias": "true"}, "attention_bias must be true or false"),
        ("llama2", {"attention_bias": True}, r"lacks tensor 'layers.0.self_attn.k_proj.bias' \(and 11 more\)"),
        ("llama2", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama2", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama2", {"num_local_experts": 8}, "num_local_experts"),
        ("llama2", {"sliding_window": 4}, "sliding_window"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama2", {"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ("llama2", {"head_dim": 11}, "head_dim must be even for rotary positions, but is 11"),
        ("llama2", {"hidden_size": "large"}, "hidden_size.*'large'"),
        ("llama2", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim must be 4"),
        ("llama2", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ("llama2", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama2", {"rope_parameters": {"full_attention": {}}}, "the same for all layers"),
        ("llama2", {"rope_scaling": "linear"}, "one flat object"),
        ("llama2", {"num_key_value_heads": "2"}, "num_key_value_heads"),
        ("mistral", {"sliding_window": -1}, "sliding_window.*-1"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is off"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("qwen3", {"layer_types": 5}, "layer_types"),
        ("qwen3", {"layer_types": [["x"]] * 3}, "layer_types"),
        ("llama2", {"architectures": [["x"]]}, "is not supported"),
        ("llama2", {"architectures": {"a": 1}}, "is not supported"),
        ("llama2", {"quantization": {"bits": 4}}, "quantized .*4 bits"),
        ("llama2", {"vocab_size": 10**12}, "GB, do not fit into cpu memory"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
        ("gpt2", {"n_head": 5}, "n_head = 5"),
    ],
)
def test_options_that_would_change_results_are_refused(family, changes, match, copy):
    refused(edit_config(copy(family), **changes), match)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_config_lacks_a_number(key, copy):
    refused(edit_config(copy(), drop=key), f"{key} must be")


def test_config_missing_or_damaged(copy):
    directory = copy()
    for damage in ("{", "[]", "\udcff"):
        (directory / "config.json").write_text(damage, errors="surrogateescape")
        refused(directory, "config.json")
    (directory / "config.json").unlink()
    refused(directory, "holds no config.json")


def test_a_damaged_tokenizer(copy):
    directory = copy()
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer in"):
        load_model(str(directory), "cpu")


# --- rejected: weights ----------------------------------------------------------------------------


def test_tensors_missing_unexpected_or_of_another_shape(copy):
    directory = copy()
    refused(edit_weights(directory, lambda t: t.pop(PICKED)), r"lacks tensor 'layers.1.self_attn.k_proj.weight'")
    refused(
        edit_weights(directory, lambda t: t.update({PICKED: torch.ones(48, 47)})),
        r"k_proj.*\[48, 47\].*48, 48",
    )
    refused(
        edit_weights(directory, lambda t: t.update({PICKED: torch.ones(48, 48), "lora.A": torch.ones(2)})),
        "model.safetensors: tensor 'lora.A' is not part",
    )


def test_a_head_that_is_not_stored(copy):
    refused(edit_weights(copy("llama2"), lambda t: t.pop("lm_head.weight")), "lacks tensor 'lm_head.weight'")


@pytest.mark.parametrize("keep", [0, 5, 200, 20_000])
def test_truncated_weights(keep, copy):
    directory = copy()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, "model.safetensors is damaged")


def test_no_weights_or_only_pickles(copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    refused(directory, "holds no weights")
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    refused(directory, "pytorch_model.bin, a pickle")


def test_a_shard_is_missing(checkpoint, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint("gpt2")).save_pretrained(
        tmp_path, max_shard_size="50KB"
    )
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, f"{shard.name} is missing.*transformer")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "weight_map")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="only Linux has transparent huge pages"
)
def test_large_weights_are_asked_to_lie_on_large_pages(tmp_path):
    save_llama(tmp_path, vocab_size=1 << 14)
    model = load_model(str(tmp_path), "cpu", "float32").model
    assert model.embed_tokens.weight.nbytes == 4 << 20
    middle = model.embed_tokens.weight.data_ptr() + (2 << 20)
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
        elif first == "VmFlags:" and start <= middle < end:
            flags = line.split()[1:]
    assert flags is not None and "hg" in flags


# --- checkpoints as they come ---------------------------------------------------------------------


@pytest.mark.parametrize(("family", "embedding", "prefix"), [
    ("smollm2", "model.embed_tokens.weight", "model."),
    ("qwen2", "model.embed_tokens.weight", "model."),
    ("gpt2", "transformer.wte.weight", "transformer."),
])  # fmt: skip
@pytest.mark.parametrize("way", ["plain", "sharded", "without prefix", "prefix before the head"])
def test_tied_weights_of_which_only_the_head_was_saved(family, embedding, prefix, way, copy, checkpoint):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop(embedding)
        if way == "without prefix":
            for name in list(tensors):
                tensors[name.removeprefix(prefix)] = tensors.pop(name)
        if way == "prefix before the head":
            tensors[f"{prefix}lm_head.weight"] = tensors.pop("lm_head.weight")

    directory = edit_weights(copy(family), change)
    if way == "sharded":
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names, weight_map = sorted(tensors), {}
        for part in range(3):
            file = f"model-{part + 1:05}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names[part::3]}, directory / file)
            weight_map |= {name: file for name in names[part::3]}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(directory, checkpoint(family))


def test_neither_head_nor_embedding(copy):
    directory = edit_weights(copy("smollm2"), lambda t: t.pop("model.embed_tokens.weight"))
    refused(directory, "lacks tensor 'embed_tokens.weight'$")
    refused(edit_weights(directory, lambda t: t.update({"lm_head.weight": torch.ones(7, 48)})), r"'lm_head.*\[7, 48\]")


def test_a_tensor_under_two_names(copy):
    directory = copy("llama2")
    refused(
        edit_weights(directory, lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()})), "occurs twice"
    )


def test_how_many_tensors_are_strange_or_missing(copy):
    def change(tensors):
        for name in [name for name in tensors if "mlp" in name]:
            tensors[f"{name.removesuffix('.weight')}.qweight"] = tensors.pop(name).to(torch.int32)

    directory = edit_weights(copy("llama2"), change)
    refused(directory, r"down_proj.qweight' \(and 8 more\) is not part.*quantized weights, which are not supported")
    edit_weights(directory, lambda t: [t.pop(name) for name in list(t) if "mlp" in name])
    refused(directory, r"lacks tensor 'layers.0.mlp.down_proj.weight' \(and 8 more\)$")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_of_quantized_weights_are_not_taken_for_weights(dtype, copy):
    directory = edit_weights(copy("llama2"), lambda t: t.update({PICKED: t[PICKED].to(dtype)}))
    refused(directory, f"k_proj.weight' is stored as {str(dtype)[6:]}, as in quantized checkpoints")


@pytest.mark.parametrize(("given", "match"), [
    ({"quant_method": "gptq", "bits": 4}, r"quantized \(gptq, 4 bits"),
    ({"quant_method": "awq", "w_bit": 4}, r"quantized \(awq, 4 bits"),
    ({"load_in_4bit": True}, r"quantized \(bitsandbytes, 4 bits"),
    ({"quant_method": "fp8"}, r"quantized \(fp8; quantization_config"),
    ("?", "unknown method"),
])  # fmt: skip
def test_quantized_checkpoints_are_named(given, match, copy):
    refused(edit_config(copy(), quantization_config=given), match)


def test_old_gptq_checkpoints_are_named(copy):
    directory = copy()
    (directory / "quantize_config.json").write_text('{"bits": 3}')
    refused(directory, r"quantized \(gptq, 3 bits")


def test_a_lora_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, r"a LoRA adapter, not a whole model. Merge it into its base model \(owner/base\) with peft")
    config = config_of("llama2").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    refused(tmp_path, "a LoRA adapter, not a whole model")


def test_directories_without_a_config(tmp_path, checkpoint):
    refused(tmp_path, r"holds no config.json.*\(it holds nothing: it is empty\)")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, r"holds no config.json.*\(it holds only notes.txt\)")
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    refused(tmp_path, "format of Meta or Mistral")
    shutil.copytree(checkpoint("gpt2"), tmp_path / "final")
    refused(tmp_path, "holds no config.json, but .*final does; give that directory")


@pytest.mark.parametrize(("name", "match"), [
    ("model.gguf", "model.gguf, GGUF; give that file"),
    ("tf_model.h5", "TensorFlow's format"),
    ("flax_model.msgpack", "Flax's format"),
    ("consolidated.safetensors", "a file of another name"),
    ("model-00001-of-00003.safetensors", "not model.safetensors.index.json, which names all shards"),
    ("training_args.bin", "holds no weights. minipaged reads model.safetensors"),
])  # fmt: skip
def test_weights_in_other_formats(name, match, copy):
    directory = copy()
    (directory / "model.safetensors").rename(directory / name)
    refused(directory, match)


def cached(checkpoint: Path, tmp_path: Path) -> Path:
    """A snapshot as it lies in the hub's cache: links to blobs."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    shutil.copytree(checkpoint, snapshot)
    blob = tmp_path / "models--owner--name" / "blobs" / "2c3d"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


@pytest.mark.parametrize(("damage", "match"), [
    ("blob", "model.safetensors is a link to a file that is not there"),
    ("weights", "holds no weights"),
    ("config.json", "holds no config.json"),
    ("truncated", r"is damaged: it ends after 5,000 of [\d,]+ bytes"),
])  # fmt: skip
def test_a_snapshot_of_the_hub_that_was_cut_off(damage, match, checkpoint, tmp_path, monkeypatch):
    snapshot = cached(checkpoint("llama2"), tmp_path)
    weights = snapshot / "model.safetensors"
    if damage == "blob":
        weights.resolve().unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        (weights if damage == "weights" else snapshot / damage).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **options: str(snapshot))
    refused("owner/name", f"{match}.*if its download was cut off, run `hf download owner/name`")


def test_other_downloads_that_were_cut_off(copy):
    directory = copy()
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:5000])
    refused(directory, "it ends after 5,000 of .* bytes; copy or download it again")
    partial = directory / ".cache" / "huggingface" / "download" / "x.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"")
    refused(directory, "download was not completed .*incomplete files.*run the same download again")
    path.unlink()
    refused(directory, "holds no weights.*download was not completed")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(directory, "is a pointer of Git LFS.*git lfs pull")


@pytest.mark.parametrize("name", ["sub/model-1.safetensors", "../../etc/nothing", ""])
def test_a_shard_in_another_folder_is_missing(name, copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(directory, "is missing; model.safetensors.index.json says that it holds 'lm_head.weight'")


def test_files_of_quantizers_and_adapters_are_named(copy):
    directory = copy()
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    refused(directory, r"quantized \(modelopt")
    (directory / "hf_quant_config.json").unlink()
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    refused(directory, "holds only adapter_model.safetensors, a LoRA adapter")


def test_a_scaling_beyond_all_numbers(copy):
    scaled = load_model(str(edit_config(copy("llama2"), rope_scaling={"type": "linear", "factor": 1e308})), "cpu")
    assert scaled.spec.max_model_len == 2**31


def test_defaults_and_names_are_those_of_transformers(checkpoint):
    config = json.loads((Path(checkpoint("qwen3")) / "config.json").read_text())
    plain = {key: config[key] for key in config if key not in ("head_dim", "num_key_value_heads")}
    read = LlamaConfig.from_config(plain | {"num_attention_heads": 32, "hidden_size": 64}, "Qwen3ForCausalLM")
    assert (read.head_dim, read.num_kv_heads) == (128, 32)
    mistral = LlamaConfig.from_config(plain | {"num_attention_heads": 32, "hidden_size": 64}, "MistralForCausalLM")
    assert (mistral.head_dim, mistral.num_kv_heads) == (2, 8)
    config = json.loads((Path(checkpoint("gpt2")) / "config.json").read_text())
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    renamed = {names.get(key, key): value for key, value in config.items()}
    assert GPT2Config.from_config(renamed, "") == GPT2Config.from_config(config, "")


def test_several_shards_are_missing(checkpoint, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint("gpt2")).save_pretrained(
        tmp_path, max_shard_size="50KB"
    )
    shards = sorted(tmp_path.glob("*.safetensors"))
    for shard in shards[1:]:
        shard.unlink()
    refused(tmp_path, rf"{shards[1].name} is missing \(and {len(shards) - 2} more of {len(shards)}\)")


@pytest.mark.parametrize(("files", "match"), [
    ({"tokenizer.model": "x"}, r"only as tokenizer.model \(SentencePiece\).*: pip install sentencepiece protobuf$"),
    ({"tokenizer.model": "x", "tokenizer_config.json": "{}"}, "pip install sentencepiece protobuf"),
    ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "a tokenizer_config.json, but no vocabulary"),
    ({"vocab.json": '{"a": 0}'}, "vocab.json, but no merges.txt"),
])  # fmt: skip
def test_incomplete_tokenizers(files, match, copy, monkeypatch):
    monkeypatch.setattr("minipaged.models.diagnosis._installed", lambda module: False)
    directory = copy()
    for name, content in files.items():
        (directory / name).write_text(content)
    refused(directory, match)


def test_a_sentencepiece_model_that_is_damaged(copy, monkeypatch):
    monkeypatch.setattr("minipaged.models.diagnosis._installed", lambda module: True)
    directory = copy()
    (directory / "tokenizer.model").write_text("x")
    refused(directory, "tokenizer.model cannot be read as a SentencePiece model; download it again")


def test_a_config_that_names_its_architecture_alone(copy, checkpoint):
    assert same_weights(edit_config(copy(), architectures="LlamaForCausalLM"), checkpoint("llama2"))
