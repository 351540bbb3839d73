"""Which kernels an engine runs: what is chosen, what is refused, and that triton is left alone unless chosen."""

import inspect
import subprocess
import sys

import pytest
import torch

from minipaged import LLM
from minipaged.errors import InvalidConfig
from minipaged.kernels import backend
from minipaged.kernels.backend import choose, kernels_for

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
    assert choose("auto", CPU)[0] == "torch" and choose("auto", torch.device("mps"))[0] == "torch"


def test_auto_is_torch_without_triton_and_says_so(no_triton):
    name, why = choose("auto", CUDA)
    assert name == "torch" and "not installed" in why


def test_triton_without_triton_is_refused(no_triton):
    with pytest.raises(InvalidConfig, match="not installed"):
        choose("triton", CUDA)


def test_triton_on_a_cpu_is_refused_at_the_door(some_triton, monkeypatch):
    monkeypatch.setattr("minipaged.llm.load_model", lambda *_: pytest.fail("refused only after loading"))
    with pytest.raises(InvalidConfig, match='needs CUDA.*choose "torch" or "auto"'):
        LLM("tiny", device="cpu", attention="triton")


def test_torch_is_always_allowed(no_triton):
    assert choose("torch", CUDA)[0] == choose("torch", CPU)[0] == "torch"
    assert kernels_for("auto", CPU) is backend.TORCH


@pytest.mark.parametrize("wrong", [{"attention": "flash"}, {"attention": None}, {"kv_dtype": "int4"}])
def test_unknown_choices_are_refused(wrong):
    with pytest.raises(InvalidConfig, match="must be one of"):
        LLM("tiny", **wrong)


def test_every_triton_function_has_the_signature_of_its_oracle():
    pytest.importorskip("triton", reason="there is no Triton but for Linux")
    fast = backend._triton()
    for name in vars(fast):
        if name != "name":
            ours, oracle = getattr(fast, name), getattr(backend.TORCH, name)
            assert ours is not oracle
            assert inspect.signature(ours) == inspect.signature(oracle), name


def test_triton_is_not_imported_unless_chosen():
    code = """
import sys
from minipaged import LLM, SamplingParams
LLM("tiny", device="cpu").generate("Once", SamplingParams(max_tokens=2))
print(*sorted(name for name in sys.modules if name.startswith("minipaged.kernels.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["minipaged.kernels.backend", "minipaged.kernels.reference"], done.stderr
