"""GGUF files: their weights equal those of the checkpoints they were made of; damaged files are one-line errors."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from minipaged import LLM, SamplingParams
from minipaged.bench.gguf_file import write_gguf
from minipaged.errors import ModelError
from minipaged.features.tensor_parallel.shard import Shard
from minipaged.models.gguf import TYPES, GGUFFile
from minipaged.models.loader import load_model
from minipaged.text.gguf_tokenizer import gguf_tokenizer
from tests.models.families import config_of, randomize
from tests.models.gguf_files import (
    Data,
    dequantized,
    metadata_of,
    random_data,
    small_llama,
    tensors_of,
    text,
    typed,
    write,
)

FAMILIES = {"llama2": "llama", "llama3": "llama", "llama-linear": "llama", "smollm2": "llama",
            "qwen2": "qwen2", "qwen3": "qwen3"}  # fmt: skip


def refused(path: Path, match: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        load_model(str(path), "cpu")
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 600, message
    return message


@pytest.fixture
def family_file(tmp_path):
    """family → (a GGUF file, the model of transformers with the same weights)."""

    def make(family: str) -> tuple[Path, transformers.PreTrainedModel]:
        model = transformers.AutoModelForCausalLM.from_config(config_of(family))
        randomize(model)
        architecture = FAMILIES[family]
        metadata = metadata_of(model.config, architecture)
        return write(tmp_path / f"{family}.gguf", metadata, tensors_of(model, architecture)), model.eval()

    return make


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, family_file):
    """Every difference between the formats would show: the order of channels, names, positions, ties, biases, norms."""
    path, model = family_file(family)
    prompt = torch.randint(0, 131, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    llm = LLM(path, device="cpu", num_blocks=16, attention="torch")
    assert llm.engine.config.model == str(path)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
    (output,) = llm.generate([prompt], params)[0].outputs
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output.token_ids])).logits[0].log_softmax(-1)
    rows = logits[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == output.token_ids
    mine = [logprobs[token] for logprobs, token in zip(output.logprobs, output.token_ids, strict=True)]
    torch.testing.assert_close(torch.tensor(mine), rows.max(-1).values, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [name for name, *_ in TYPES.values()])
def test_every_type_is_what_the_package_makes_of_it(kind, dtype, tmp_path):
    metadata, tensors = small_llama(kind, vocab=1100)  # the embedding is read in several pieces
    loaded = load_model(str(write(tmp_path / "model.gguf", metadata, tensors)), "cpu", dtype)
    views = dict(loaded.model.checkpoint_views())
    pairs = {"embed_tokens": "token_embd", "layers.0.mlp.down_proj": "blk.0.ffn_down",
             "layers.0.self_attn.v_proj": "blk.0.attn_v", "layers.0.input_layernorm": "blk.0.attn_norm"}  # fmt: skip
    for mine, theirs in pairs.items():
        expected = dequantized(tensors[f"{theirs}.weight"])
        assert expected.isfinite().all() and expected.std() > 0.01
        assert torch.equal(views[f"{mine}.weight"], expected.to(getattr(torch, dtype))), mine
    heads = dequantized(tensors["blk.0.attn_k.weight"]).view(2, 32, 2, 256)  # 2 heads of 32 neighbouring pairs
    assert torch.equal(
        views["layers.0.self_attn.k_proj.weight"], heads.transpose(1, 2).reshape(128, 256).to(getattr(torch, dtype))
    )


def test_every_rank_gets_its_part(family_file):
    path, _ = family_file("llama3")
    whole = dict(load_model(str(path), "cpu").model.checkpoint_views())
    parts = [dict(load_model(str(path), "cpu", shard=Shard(rank, 2)).model.checkpoint_views()) for rank in range(2)]
    for name in ("layers.1.self_attn.q_proj.weight", "layers.2.mlp.gate_proj.weight"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    name = "layers.0.self_attn.o_proj.weight"
    down = [part.get(name, part.get(name.replace("o_proj", "o_proj.linear"))) for part in parts]
    assert torch.equal(torch.cat(down, 1), whole[name])


def test_a_file_by_the_package_s_own_writer(checkpoint):
    """`minipaged bench` writes GGUF files for llama.cpp, with code that knows nothing of this reader."""
    path = Path(write_gguf(str(checkpoint("llama2")), "float32"))
    theirs = load_model(str(checkpoint("llama2")), "cpu").model.state_dict()
    mine = load_model(str(path), "cpu")
    assert mine.tokenizer is None and mine.spec.eos_token_ids == frozenset()
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.model.state_dict().items())


def test_dtypes(tmp_path):
    path = write(tmp_path / "model.gguf", *small_llama("Q4_K"))
    assert GGUFFile(path).config()["dtype"] == "bfloat16"
    assert load_model(str(path), "cpu", "auto").dtype == torch.float32  # small, on a CPU
    assert GGUFFile(write(path, *small_llama("F32"))).config()["dtype"] == "float32"


def test_the_configuration(tmp_path):
    metadata, tensors = small_llama()
    own = {"llama.rope.freq_base": 5e5, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
           "llama.rope.scaling.original_context_length": 16, "llama.rope.scaling.attn_factor": 2.0}  # fmt: skip
    config = GGUFFile(write(tmp_path / "model.gguf", metadata | own, tensors)).config()
    assert config["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 5e5, "partial_rotary_factor": 1.0, "factor": 4.0,
        "original_max_position_embeddings": 16, "attention_factor": pytest.approx(2 * 1.1386294),
    }  # fmt: skip
    assert (config["head_dim"], config["max_position_embeddings"], config["tie_word_embeddings"]) == (64, 64, True)
    assert config["rms_norm_eps"] == pytest.approx(1e-5) and config["eos_token_id"] == [2]
    tensors["output.weight"] = random_data("F16", (40, 256))
    assert not GGUFFile(write(tmp_path / "model.gguf", metadata, tensors)).config()["tie_word_embeddings"]


def test_alignment_is_the_file_s(tmp_path):
    metadata, tensors = small_llama("Q6_K", **{"general.alignment": 4096})
    write(tmp_path / "wide.gguf", metadata, tensors, alignment=4096)
    views = dict(load_model(str(tmp_path / "wide.gguf"), "cpu").model.checkpoint_views())
    assert torch.equal(views["layers.0.mlp.up_proj.weight"], dequantized(tensors["blk.0.ffn_up.weight"]))


def test_the_dequantised_pieces_are_small(tmp_path, monkeypatch):
    from gguf import quants

    largest, dequantize = [], quants.dequantize
    monkeypatch.setattr(quants, "dequantize", lambda raw, kind: largest.append(raw.size) or dequantize(raw, kind))
    load_model(str(write(tmp_path / "model.gguf", *small_llama("Q8_0", vocab=4000))), "cpu", "bfloat16")
    assert max(largest) < 150_000 < 4000 * 256, "the whole embedding must not be in memory in float32"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general.architecture": "gemma3"}, "'gemma3' is not supported. Supported: llama, qwen2, qwen3"),
        ({"general.architecture": 7}, "general.architecture must be str, not 7"),
        ({"general.type": "adapter"}, "holds no model, but .*'adapter'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 32}, "sliding_window = 32 is not supported"),
        ({"llama.attention.head_count": 5}, r"tensor 'blk.0.attn_q.weight' has shape \[256, 256\].*imply \[255, 256\]"),
        ({"llama.attention.head_count": [4, 4]}, r"head_count must be int, not \[4, 4\]"),
        ({"llama.attention.head_count_kv": 1}, "'blk.0.attn_k.weight' has shape"),
        ({"llama.embedding_length": 2**31}, "'token_embd.weight' has shape"),
        ({"llama.embedding_length": 0}, "embedding_length must be at least 1, not 0"),
        ({"llama.feed_forward_length": 2**31}, "'blk.0.ffn_gate.weight' has shape"),
        ({"llama.block_count": 2**31}, "block_count is 2147483648, but the file has 11 tensors"),
        ({"llama.block_count": "1"}, "block_count must be int, not '1'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon must be float, not nan"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps must be a positive number"),
        ({"llama.attention.key_length": 32}, "'blk.0.attn_q.weight' has shape"),
        ({"llama.attention.value_length": 32}, "value_length"),
        ({"llama.rope.dimension_count": 32}, "partial_rotary_factor = 0.5 is not supported"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, "rope type 'su' is not supported"),
        ({"llama.vocab_size": 41}, "'token_embd.weight' has shape"),
        ({"tokenizer.ggml.tokens": [str(i) for i in range(41)]}, "41 tokens, but embeddings of 40"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "eos_token_id is 2, but the file has 2 tokens"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id must be int, not '2'"),
    ],
)
def test_what_is_not_supported_is_named(changes, match, tmp_path):
    refused(write(tmp_path / "model.gguf", *small_llama(**changes)), match)


def test_a_missing_key_is_named(tmp_path):
    metadata, tensors = small_llama()
    for key in ("general.architecture", "llama.embedding_length", "llama.context_length"):
        left = {name: value for name, value in metadata.items() if name != key}
        refused(write(tmp_path / "model.gguf", left, tensors), f"lack {key}")


def edited(**changes: Data | None) -> dict[str, Data]:
    tensors = small_llama()[1] | changes
    return {name: data for name, data in tensors.items() if data is not None}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (edited(**{"blk.0.ffn_up.weight": None}), "lacks tensor 'blk.0.ffn_up.weight'"),
        (edited(**{"blk.0.ffn_up.weight": None, "x": random_data("F32", (1,))}), "lacks tensor 'blk.0.ffn_up.weight'"),
        (edited(**{"token_embd.weight": None, "x": random_data("F32", (1,))}), "lacks tensor 'token_embd.weight'"),
        (edited(**{"blk.0.ffn_up.weight": random_data("F32", (256, 255))}), r"has shape \[256, 255\]"),
        (edited(**{"blk.0.ffn_up.weight": random_data("F32", (256, 256, 1))}), r"has shape \[256, 256, 1\]"),
        (edited(**{"blk.0.attn_q.bias": random_data("F32", (256,))}), "bias"),
        (edited(**{"blk.0.extra.weight": random_data("F32", (1,))}), "'blk.0.extra.weight' is not part of"),
        (edited(**{"blk.1.attn_q.weight": random_data("F32", (256, 256))}), "'blk.1.attn_q.weight' is not part of"),
        (edited(**{"rope_freqs.weight": random_data("F32", (31,))}), r"'rope_freqs.weight' has shape \[31\]"),
        (edited(**{"rope_freqs.weight": ("F32", (32,), bytes(128))}), "rope_freqs.weight must hold positive numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, match, tmp_path):
    refused(write(tmp_path / "model.gguf", small_llama()[0], tensors), match)


BIG = 2**64 - 1
UP = "blk.0.ffn_up.weight"
ARRAY_OF = struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 0)  # an array of arrays


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (dict(version=1), "GGUF version 1"),
        (dict(version=3 << 24), "little-endian"),
        (dict(counts=(BIG, None)), "cannot hold the 18,446,744,073,709,551,615 entries claimed"),
        (dict(counts=(None, BIG)), "cannot hold the 18,446,744,073,709,551,615 entries claimed"),
        (dict(counts=(None, 2**20)), "claimed|does not fit|UTF-8|unknown type|twice"),
        (dict(info={UP: dict(offset=BIG - 31)}), "not aligned|ends at byte"),
        (dict(info={UP: dict(offset=2**62)}), "'blk.0.ffn_up.weight' ends at byte"),
        (dict(info={UP: dict(offset=33)}), "not aligned to 32 bytes"),
        (dict(info={UP: dict(offset=0)}), "inside another one"),
        (dict(info={UP: dict(dims=())}), "has 0 dimensions"),
        (dict(info={UP: dict(dims=(1,) * 5)}), "has 5 dimensions"),
        (dict(info={UP: dict(dims=(BIG, BIG))}), "ends at byte"),
        (dict(info={UP: dict(dims=(0, 256))}), r"has shape \[256, 0\]"),
        (dict(info={UP: dict(type=12, dims=(255, 256))}), "Q4_K has blocks of 256 values"),
        (dict(info={UP: dict(type=10)}), "unsupported type Q2_K. Supported: F32, F16, BF16, Q8_0, Q4_0"),
        (dict(info={UP: dict(type=4)}), "unsupported type 4"),
        (dict(info={UP: dict(type=BIG % 2**32)}), "unsupported type 4294967295"),
        (dict(twice=True), "has the tensor 'blk.0.ffn_down.weight' twice"),
        (dict(metadata={"general.alignment": 0}), "general.alignment is 0"),
        (dict(metadata={"general.alignment": 24}), "general.alignment is 24"),
        (dict(metadata={"general.alignment": "32"}), "general.alignment is '32'"),
        (dict(metadata={"x": struct.pack("<I", 99)}), "'x' has the unknown type 99"),
        (dict(metadata={"x": ARRAY_OF}), "'x' is an array of type 9"),
        (dict(metadata={"x": struct.pack("<IIQ", 9, 8, BIG)}), "entries claimed"),
        (dict(metadata={"x": struct.pack("<IIQ", 9, 10, 2**60)}), "entries claimed"),
        (dict(metadata={"x": struct.pack("<IQ", 8, BIG)}), "does not fit"),
        (dict(metadata={"x": struct.pack("<I", 8) + text(b"\xff\xfe")}), "is not UTF-8"),
        (dict(metadata={b"\xff": 1}), "is not UTF-8"),
        (dict(metadata={"x": typed(1) + text("x") + typed(1)}, counts=(None, 12)), "has the key 'x' twice"),
    ],
)
def test_damaged_files_are_one_line_errors(how, match, tmp_path):
    metadata, tensors = small_llama()
    how = dict(how)
    metadata |= how.pop("metadata", {})
    refused(write(tmp_path / "model.gguf", metadata, tensors, **how), match)


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"G", b"GGUF", b"GGUF\3\0\0\0", b"GGML" + bytes(100), b"PK\3\4" + bytes(100)):
        path.write_bytes(content)
        refused(path, "cannot be read|is damaged")
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK\3\4")
    with pytest.raises(ModelError, match="is a file, but no GGUF file"):
        load_model(str(other))
    write(other, *small_llama())
    assert load_model(str(other), "cpu").spec.vocab_size == 40, "the content counts, not the name"
    for name in ("lost.gguf", "folder/lost.gguf", str(tmp_path / "lost.gguf")):  # never asked of the hub
        with pytest.raises(ModelError, match="there is no file '.*lost.gguf'"):
            load_model(name)
    with pytest.raises(ModelError, match="holds no config.json; to load model.gguf, give its path"):
        load_model(str(tmp_path))


def test_truncated_anywhere(tmp_path):
    whole = write(tmp_path / "whole.gguf", *small_llama()).read_bytes()
    path = tmp_path / "model.gguf"
    cuts = [*range(0, 2000, 13), *range(2000, len(whole), len(whole) // 40), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refused(path, "damaged|cannot be read")


def test_damage_of_any_byte_of_the_header_is_an_error_or_does_no_harm(tmp_path):
    """Never another exception, never a long wait, never much memory."""
    tokens = [*"abcdefgh", "ab", "abc", "<s>", "</s>", *(f"t{i}" for i in range(28))]
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
                 "tokenizer.ggml.token_type": [1] * 10 + [3, 3] + [1] * 28, "tokenizer.ggml.merges": ["a b", "ab c"],
                 "tokenizer.ggml.bos_token_id": 10, "tokenizer.chat_template": "{{ messages }}"}  # fmt: skip
    metadata, tensors = small_llama(**tokenizer)
    whole = write(tmp_path / "whole.gguf", metadata, tensors).read_bytes()
    header = whole.index(b"blk.0.ffn_down.weight") + 60
    rng, path, harmless = random.Random(5), tmp_path / "model.gguf", 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            file.config()
            gguf_tokenizer(file)
            harmless += 1
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert 20 < harmless < 380


def test_without_the_package_the_error_says_what_to_install(tmp_path):
    path = write(tmp_path / "model.gguf", *small_llama())
    program = "import sys; sys.modules['gguf'] = None; from minipaged.cli import main; main()"
    command = [sys.executable, "-c", program, "generate", "hello", "--model", str(path), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "compiling the C++ kernels" not in line]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "pip install gguf" in done.stderr


def test_half_precision_beyond_the_range_of_float16_stays_finite_in_bfloat16(tmp_path):
    metadata, tensors = small_llama("BF16")
    huge = torch.full((40, 256), 1e30, dtype=torch.bfloat16).view(torch.int16).numpy().astype(np.int16)
    tensors["token_embd.weight"] = ("BF16", (40, 256), huge.tobytes())
    loaded = load_model(str(write(tmp_path / "model.gguf", metadata, tensors)), "cpu", "bfloat16")
    assert loaded.model.embed_tokens.weight.isfinite().all()
