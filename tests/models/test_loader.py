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
from minipaged.models.layers import Rope
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
