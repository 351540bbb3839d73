"""The choice of an engine's kernels: defaults, rejected choices, and that triton is not imported unless chosen."""

import inspect
import subprocess
import sys

import pytest
import torch

from minipaged import LLM
from minipaged.config import EngineConfig
from minipaged.errors import InvalidConfig
from minipaged.kernels import backend
from minipaged.kernels.backend import choose, kernels_for
from tests.execution.test_reference import paged

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled_not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)


@pytest.fixture
def some_triton(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: object())


def test_auto_is_triton_where_there_are_cuda_and_triton(some_triton):
    assert choose("auto", CUDA)[0] == "triton"
    assert choose("auto", CPU)[0] in ("native", "torch") and choose("auto", torch.device("mps"))[0] == "torch"


def test_auto_is_torch_without_triton_and_says_so(no_triton):
    name, why = choose("auto", CUDA)
    assert name == "torch" and "not installed" in why


def test_triton_without_triton_is_refused(no_triton):
    with pytest.raises(InvalidConfig, match="not installed"):
        choose("triton", CUDA)


def test_triton_on_a_cpu_is_refused_at_the_door(some_triton, monkeypatch):
    monkeypatch.setattr("minipaged.models.loader.load_model", lambda *_: pytest.fail("rejected only after loading"))
    with pytest.raises(InvalidConfig, match='needs CUDA.*choose "torch" or "auto"'):
        LLM("tiny", device="cpu", attention="triton")


def test_flex_is_refused_where_it_would_crawl_and_for_what_it_cannot_read():
    assert choose("flex", CUDA)[0] == "flex" and kernels_for("flex", CUDA).name == "flex"
    with pytest.raises(InvalidConfig, match='needs CUDA.*choose "torch" or "auto"'):
        choose("flex", CPU)
    for wrong in ({"block_size": 24}, {"kv_dtype": "int8"}):
        with pytest.raises(InvalidConfig, match="a multiple of 16, and kv_dtype"):
            EngineConfig(attention="flex", **wrong)
    assert EngineConfig(attention="flex", block_size=48).attention == "flex"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("block_size", [5, 16])
def test_flex_equals_the_oracle(block_size, window):
    """Uncompiled flex computes the same, slowly. Unused slots hold large numbers, because flex does not support NaN."""
    lengths, counts = [1, block_size, 37, 33], [1, 1, 20, 33]
    k_cache, v_cache, tables, _ = paged(lengths, block_size, 2, 16)
    caches = k_cache.nan_to_num(1e4), v_cache.nan_to_num(1e4)
    lens, q = torch.tensor(lengths), torch.randn(sum(counts), 4, 16)
    fast, slow = kernels_for("flex", CUDA), backend.TORCH
    decodes = [kernels.paged_decode(q[:4], *caches, tables, lens, 0.3, window) for kernels in (fast, slow)]
    torch.testing.assert_close(*decodes)
    prefills = [kernels.paged_prefill(q, *caches, tables, lengths, counts, 0.3, window) for kernels in (fast, slow)]
    torch.testing.assert_close(*prefills)


def test_torch_is_always_allowed(no_triton):
    assert choose("torch", CUDA)[0] == choose("torch", CPU)[0] == "torch"
    assert kernels_for("torch", CPU) is backend.TORCH


@pytest.mark.parametrize("wrong", [{"attention": "flash"}, {"attention": None}, {"kv_dtype": "int4"}])
def test_unknown_choices_are_refused(wrong):
    with pytest.raises(InvalidConfig, match="must be one of"):
        LLM("tiny", **wrong)


def test_every_triton_function_has_the_signature_of_its_oracle():
    pytest.importorskip("triton", reason="Triton exists only for Linux")
    fast, flex = backend._triton(), backend._flex()
    for name in set(vars(fast)) - {"name"}:
        oracle = getattr(backend.TORCH, name)
        assert getattr(fast, name) is not oracle
        for ours in (getattr(fast, name), getattr(flex, name)):
            assert inspect.signature(ours) == inspect.signature(oracle), name


def test_triton_is_not_imported_unless_chosen():
    code = """
import sys
from minipaged import LLM, SamplingParams
LLM("tiny", device="cpu").generate("Once", SamplingParams(max_tokens=2))
print(*sorted(name for name in sys.modules if name.startswith("minipaged.kernels.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    plain = [f"minipaged.kernels.{name}" for name in ("backend", "native", "reference")]
    assert done.stdout.split() == plain, done.stderr
