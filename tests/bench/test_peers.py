"""The comparison of engines: the protocol with their processes, rejected options, and derived numbers."""

import sys
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipaged.bench import peers
from minipaged.bench.gguf_file import write_gguf
from minipaged.errors import InvalidConfig

STUB = """
import json, sys
print(json.dumps({"ready": 0.5, "version": "1"}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    print(json.dumps({"seconds": SECONDS, "lengths": LENGTHS, "peak_mib": 7}), flush=True)
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Installs a driver that generates no tokens; its process and the protocol are real."""

    def install(lengths="work['outputs']", seconds="2.0 if sys.argv[1] == 'minipaged' else 5.0"):
        path = tmp_path / "stub.py"
        path.write_text(STUB.replace("LENGTHS", lengths).replace("SECONDS", seconds))
        monkeypatch.setattr(peers.drivers, "__file__", str(path))
        monkeypatch.setattr(peers, "make_checkpoint", lambda name, directory: directory / name)

    return install


def test_engines_take_turns_and_ratios_are_of_neighbours(stub, tmp_path):
    stub()
    chosen = peers.engines(["vllm"], [f"vllm={sys.executable}"])
    result = peers.measure(chosen, ["llama-6m"], ["float32"], 2, True, lambda text: None)
    assert result["engines"] == {"minipaged": "1", "vllm": "1"} and len(result["starts"]) == 2
    row = next(row for row in result["rows"] if row["engine"] == "vllm" and row["cell"] == "batch 8")
    assert len(row["tokens_per_second"]) == 2 and row["best"] == 8 * 16 / 5
    assert row["ratio"] == 2.5 and row["ratio_spread"] == [2.5, 2.5] and row["peak_mib"] == 7
    assert peers.table(result).row_count == 8
    assert "peers.html" in peers.write_figure(result, tmp_path) and (tmp_path / "peers.html").stat().st_size > 1000


def test_an_engine_that_generates_other_lengths_is_not_compared(stub):
    stub(lengths="[1] * len(work['outputs'])")
    with pytest.raises(InvalidConfig, match="minipaged generated other lengths"):
        peers.measure(peers.engines([], []), ["llama-6m"], ["float32"], 1, True, lambda text: None)


def test_an_engine_that_fails_is_named_with_its_last_words(stub):
    stub(seconds="1 / 0")
    with pytest.raises(InvalidConfig, match="minipaged ended without an answer: ZeroDivisionError"):
        peers.measure(peers.engines([], []), ["llama-6m"], ["float32"], 1, True, lambda text: None)


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: peers.engines(["ollama"], []), "--with must be one of"),
        (lambda: peers.engines([], ["vllm"]), "NAME=PATH"),
        (lambda: peers.engines([], ["vllm=/no/such/python"]), "no Python at"),
        (lambda: peers.measure({}, ["opt"], ["float32"], 1, True, print), "--models must be among"),
        (lambda: peers.measure({}, [], ["int8"], 1, True, print), "--dtypes must be bfloat16 or float32"),
    ],
)
def test_what_is_misspelt_is_refused_before_anything_is_made(call, complaint):
    with pytest.raises(InvalidConfig, match=complaint):
        call()


def test_requests_repeat_with_their_seed_and_fit_the_models():
    for shape in peers.SHAPES.values():
        for make in peers.cells(shape.shorter, quick=False).values():
            prompts, outputs = make(Random(1), 4096)
            assert (prompts, outputs) == make(Random(1), 4096) and len(prompts) == len(outputs)
            longest = max(len(p) + n for p, n in zip(prompts, outputs, strict=True))
            assert min(outputs) >= 1 and longest <= peers.drivers.LONGEST


class Writer:
    """A stand-in for the gguf package's writer that records its calls."""

    made: dict = {}

    def __init__(self, path, architecture):
        Writer.made = {"architecture": architecture}

    def add_tensor(self, name, data, raw_dtype):
        assert name not in self.made
        self.made[name] = data, raw_dtype

    def __getattr__(self, name):
        return lambda *values: self.made.update({name: values})


@pytest.mark.parametrize("name", ["llama-6m", "gpt2-small"])
def test_a_gguf_file_has_every_tensor_of_the_checkpoint_where_llama_cpp_looks_for_it(name, monkeypatch, tmp_path):
    kinds = SimpleNamespace(BF16="bf16", F32="f32")
    quants = SimpleNamespace(quantize=lambda values, kind: values)
    module = SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=kinds, quants=quants)
    monkeypatch.setitem(sys.modules, "gguf", module)
    shape = peers.SHAPES[name]
    small = {"num_hidden_layers": 2} if name == "llama-6m" else {"n_layer": 2, "n_embd": 24, "n_head": 3}
    monkeypatch.setitem(peers.SHAPES, name, replace(shape, config=shape.config | small))
    directory = peers.make_checkpoint(name, tmp_path)
    write_gguf(str(directory), "bfloat16")
    made, stored = Writer.made, load_file(directory / "model.safetensors")
    assert len([value for value in made.values() if value and isinstance(value[0], np.ndarray)]) == len(stored)
    if name == "llama-6m":
        ours, kind = made["blk.1.attn_q.weight"]
        theirs = stored["model.layers.1.self_attn.q_proj.weight"].reshape(8, 2, 16, 256)  # 8 heads of 2 halves of 16
        assert kind == "bf16" and np.array_equal(ours.reshape(8, 16, 2, 256)[3, 5], theirs[3, :, 5])
        assert made["blk.0.ffn_norm.weight"][1] == "f32" and made["add_head_count_kv"] == (4,)
    else:
        ours, _ = made["blk.1.ffn_up.weight"]
        assert np.array_equal(ours, stored["transformer.h.1.mlp.c_fc.weight"].T)
        assert made["position_embd.weight"][1] == "f32"
        assert made["blk.1.attn_qkv.bias"][1] == "f32" and made["add_feed_forward_length"] == (96,)
