"""The C++ kernels against their oracles, and what happens where they cannot be had."""

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidConfig
from minipaged.kernels import backend, native, reference
from minipaged.kernels.backend import choose, kernels_for
from tests.checkpoints import save_llama

CPU = torch.device("cpu")
NUMBERS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """As near as two orders of the same sum are: a bfloat16 may be rounded to its neighbour."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    exact = ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if exact else 2e-2, atol=2e-5 if exact else 2e-2)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if lacking := native.missing():
        pytest.skip(lacking)


def pages(num_seqs, blocks, kv_heads, head_dim, dtype, size=16):
    """A cache that is NaN wherever nobody has written, scattered block tables, and lengths that end within blocks."""
    torch.manual_seed(0)
    k, v = (torch.randn(num_seqs * blocks + 3, size, kv_heads, head_dim).to(dtype) for _ in range(2))
    tables = torch.randperm(num_seqs * blocks + 3)[: num_seqs * blocks].view(num_seqs, blocks)
    lens = torch.randint(1, blocks * size + 1, (num_seqs,))
    for table, length in zip(tables, lens.tolist(), strict=True):
        slots = (table[:, None] * size + torch.arange(size)).flatten()[length:]
        k.view(-1, kv_heads, head_dim)[slots] = v.view(-1, kv_heads, head_dim)[slots] = float("nan")
    return k, v, tables, lens


@NUMBERS
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 4, 32), (9, 3, 64), (4, 4, 128), (6, 1, 20)])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_decode_attention_is_the_references_whatever_lies_in_dead_slots(dtype, heads, kv_heads, head_dim, window):
    k, v, tables, lens = pages(5, 4, kv_heads, head_dim, dtype)
    fused = torch.randn(5, (heads + 2 * kv_heads) * head_dim).to(dtype)  # queries as a model has them: a part of rows
    q = fused[:, : heads * head_dim].unflatten(-1, (heads, head_dim))
    arguments = (q, k, v, tables, lens, head_dim**-0.5, window)
    close(native.paged_decode(*arguments), reference.paged_decode(*arguments))


def test_scores_too_large_for_an_exponential_do_not_overflow():
    k, v, tables, lens = pages(3, 2, 2, 32, torch.float32)
    arguments = (torch.randn(3, 4, 32) * 500, k, v, tables, lens, 1.0)
    close(native.paged_decode(*arguments), reference.paged_decode(*arguments))


@NUMBERS
def test_rotation_stores_what_the_reference_stores(dtype):
    torch.manual_seed(0)
    tokens, heads, kv_heads, size = 7, 6, 2, 20
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, size)) for x in fused.split([heads * size, kv_heads * size, kv_heads * size], -1))
    angles = torch.rand(tokens, 1, size // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(4 * 16)[:tokens]
    caches = [[torch.zeros(4, 16, kv_heads, size, dtype=dtype) for _ in range(2)] for _ in range(2)]
    turned = [m.rope_store(q, k, v, cos, sin, *c, slots) for m, c in zip((native, reference), caches, strict=True)]
    for ours, theirs in zip([turned[0], *caches[0]], [turned[1], *caches[1]], strict=True):
        close(ours, theirs)


@NUMBERS
def test_norms_and_the_gate_are_the_references(dtype):
    torch.manual_seed(0)
    x, delta, weight = torch.randn(5, 77).to(dtype), torch.randn(5, 77).to(dtype), torch.randn(77).to(dtype)
    close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    both = native.add_norm(x, delta, weight, 0.1), reference.add_norm(x, delta, weight, 0.1)
    for ours, theirs in zip(*both, strict=True):
        close(ours, theirs)
    extremes = torch.tensor([-torch.inf, -200.0, -88.0, -0.0, 0.0, 88.0, 1e30]).to(dtype)
    gate_up = torch.cat((extremes, torch.randn(90).to(dtype), torch.ones(97).to(dtype)))[None]
    ours, theirs = native.silu_mul(gate_up), reference.silu_mul(gate_up)
    close(ours.nan_to_num(0), theirs.nan_to_num(0))  # -inf · 0 is NaN, for torch too


def test_what_they_do_not_serve_goes_to_the_reference():
    x, weight = torch.randn(3, 8).half(), torch.randn(8).half()
    assert torch.equal(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_an_engine_generates_the_same_tokens_with_them(tmp_path):
    save_llama(tmp_path)
    prompts = [[1, 7, 9], list(range(3, 40)), [5] * 17]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = []
    for attention in ("native", "torch"):
        llm = LLM(str(tmp_path), device="cpu", dtype="float32", attention=attention, num_blocks=64)
        assert llm.engine.runner.kv_cache.kernels.name == attention
        found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert found[0] == found[1]


def test_without_a_compiler_torch_does_it_and_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.missing.cache_clear()
    native._library.cache_clear()
    try:
        name, why = choose("auto", CPU)
        assert name == "torch" and "no C++ compiler" in why and kernels_for("auto", CPU) is backend.TORCH
        with pytest.raises(InvalidConfig, match='no C.. compiler.*choose "torch" or "auto"'):
            choose("native", CPU)
    finally:
        native.missing.cache_clear()
        native._library.cache_clear()


def test_on_a_gpu_they_are_refused():
    with pytest.raises(InvalidConfig, match="it is for a CPU, and this is cuda"):
        choose("native", torch.device("cuda"))
