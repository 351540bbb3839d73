"""Shards of a model are narrower models whose outputs add up; here two ranks are two threads of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipaged.core.plan import StepPlan
from minipaged.errors import InvalidConfig, ModelError
from minipaged.execution.kv_cache import KVCache
from minipaged.execution.runner import ModelRunner
from minipaged.features.kv_int8 import Int8KVCache
from minipaged.features.tensor_parallel import shard
from minipaged.features.tensor_parallel.ranks import PlainChunk
from minipaged.features.tensor_parallel.shard import RowParallel, Shard
from minipaged.models.loader import load_model

CPU = torch.device("cpu")
TOKENS = [3, 77, 5, 130, 9, 9, 64, 21, 2]
STEPS = [  # a prompt in two chunks, then a decode; each token gives logits
    PlainChunk(0, 6, 6, TOKENS[:6], [2, 0, 1]),
    PlainChunk(6, 2, 2, TOKENS[6:8], [2, 0, 1]),
    PlainChunk(8, 1, 1, TOKENS[8:], [2, 0, 1]),
]


class Threads:
    """An ``all_reduce`` among threads of this process."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=30)
        self._terms: dict[int, torch.Tensor] = {}

    def all_reduce(self, out: torch.Tensor) -> None:
        self._terms[threading.get_ident()] = out.clone()
        self._barrier.wait()
        out.copy_(sum(self._terms.values()))
        self._barrier.wait()  # no thread may overwrite its term before all have summed


def forward(loaded, kv_dtype=None) -> tuple[torch.Tensor, KVCache]:
    """Logits of all STEPS, and the KV cache after them."""
    spec = loaded.spec
    shape = (spec.num_layers, 3, 4, spec.num_kv_heads, spec.head_dim)
    kv_cache = Int8KVCache(*shape, CPU) if kv_dtype is torch.int8 else KVCache(*shape, loaded.dtype, CPU)
    runner = ModelRunner(loaded.model, kv_cache, CPU)
    return torch.cat([runner.execute(StepPlan(step, [chunk])) for step, chunk in enumerate(STEPS)]), kv_cache


@pytest.fixture
def forward_on_two(monkeypatch):
    def forward_on_two(directory, dtype="float32", kv_dtype=None):
        monkeypatch.setattr(shard.dist, "all_reduce", Threads(2).all_reduce)
        loaded = [load_model(str(directory), "cpu", dtype, Shard(rank, 2)) for rank in range(2)]
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(lambda one: forward(one, kv_dtype), loaded))

    return forward_on_two


@pytest.mark.parametrize("family", ["gpt2", "gpt2-untied", "llama3", "qwen2", "qwen3", "mistral"])
def test_two_ranks_compute_what_one_process_does(family, checkpoint, forward_on_two):
    """Biases are added once, grouped queries use their own keys, and one block table serves all heads of a token."""
    whole, kv_cache = forward(load_model(str(checkpoint(family)), "cpu", "float32"))
    (logits, left), (other_logits, right) = forward_on_two(checkpoint(family))
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other_logits, whole, rtol=1e-3, atol=1e-3)
    for layer in range(3):
        for name in ("k", "v"):
            halves = [getattr(cache, name)[layer] for cache in (left, right)]
            expected = getattr(kv_cache, name)[layer]
            torch.testing.assert_close(torch.cat(halves, dim=2), expected, rtol=1e-3, atol=1e-3)


def test_quantized_keys_and_values_are_shared_out_with_their_scales(checkpoint, forward_on_two):
    _, kv_cache = forward(load_model(str(checkpoint("llama3")), "cpu", "float32"), torch.int8)
    (_, left), (_, right) = forward_on_two(checkpoint("llama3"), kv_dtype=torch.int8)
    halves = torch.cat((left.k[0], right.k[0]), dim=2).int()
    assert (halves - kv_cache.k[0].int()).abs().max() <= 1  # rounding may differ by one
    scales = torch.cat((left.k_scale[0], right.k_scale[0]), dim=2)
    torch.testing.assert_close(scales, kv_cache.k_scale[0], rtol=1e-4, atol=1e-6)


def test_bfloat16_shards(checkpoint, forward_on_two):
    whole, _ = forward(load_model(str(checkpoint("gpt2")), "cpu", "float32"))
    (logits, _), _ = forward_on_two(checkpoint("gpt2"), "bfloat16")
    assert torch.nn.functional.cosine_similarity(logits, whole).min() > 0.98


def test_of_fused_projections_each_is_shared_out():
    whole = torch.arange(12).expand(2, 12)  # 4 channels each of queries, keys and values
    parts = [Shard(rank, 2).part("h.0.attn.c_attn.weight", whole, torch.Size([2, 6]))[1].tolist() for rank in range(2)]
    assert parts == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_only_one_summand_has_the_bias():
    biases = []
    for rank in range(3):
        network = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"c_proj": torch.nn.Linear(4, 2)})})
        network.requires_grad_(False)["mlp"]["c_proj"].bias.fill_(5)
        Shard(rank, 3).join(network)
        biases.append(network["mlp"]["c_proj"].linear.bias.tolist())
    assert biases == [[5, 5], [0, 0], [0, 0]]


def test_a_rank_holds_its_share_and_no_tokenizer():
    whole, second = load_model("tiny", "cpu"), load_model("tiny", "cpu", shard=Shard(1, 2))
    wide = [name for name, _ in whole.model.named_parameters() if name.endswith("proj.weight")]
    sizes = dict(second.model.named_parameters())
    for name in wide:
        own = sizes.get(name, sizes.get(name.replace(".weight", ".linear.weight")))
        assert 2 * own.numel() == whole.model.get_parameter(name).numel()
        assert own.untyped_storage().nbytes() == own.numel() * 4  # not a view of the whole tensor
    assert (second.spec.num_heads, second.spec.num_kv_heads) == (4, 2)
    assert whole.tokenizer is not None and second.tokenizer is None


def test_only_layers_with_split_inputs_sum_over_the_ranks():
    model = load_model("tiny", "cpu", shard=Shard(0, 2)).model
    sums = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, RowParallel)}
    assert sums == {"o_proj", "down_proj"}


@pytest.mark.parametrize(("family", "world"), [("llama3", 3), ("llama3", 4), ("smollm2", 3), ("gpt2", 5)])
def test_what_does_not_divide_is_refused(family, world, checkpoint):
    """A world size that does not divide the heads is rejected: llama3 has 4 query heads, but only 2 KV heads."""
    with pytest.raises(InvalidConfig, match=rf"{world} processes cannot share .* divides \d"):
        load_model(str(checkpoint(family)), "cpu", shard=Shard(0, world))


def test_a_tensor_of_another_size_is_not_taken_for_one_to_be_split(checkpoint, tmp_path):
    """A norm of twice the right length could be split among two ranks, but is rejected."""
    for file in checkpoint("llama3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'norm.weight' has shape \[96\], but config.json implies \[48\]"):
        load_model(str(tmp_path), "cpu", shard=Shard(0, 2))
