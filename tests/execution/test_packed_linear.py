"""What a CPU with bfloat16 hardware is given: which dtype, and packed weights that change no result."""

import pytest
import torch
from torch import nn

from minipaged.execution import packed_linear
from minipaged.execution.packed_linear import PackedLinear, computes_bfloat16, pack
from minipaged.models import loader
from minipaged.models.loader import LARGE, load_model
from tests.checkpoints import save_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "stored, parameters, hardware, expected",
    [
        ("bfloat16", LARGE, True, torch.bfloat16),
        ("bfloat16", LARGE, False, torch.float32),  # emulated: slower than float32
        ("bfloat16", LARGE - 1, True, torch.float32),
        ("float32", LARGE, True, torch.float32),  # no weight is rounded unasked
        ("float16", LARGE, True, torch.float32),
    ],
)
def test_auto_is_bfloat16_for_large_models_that_are_stored_in_it(monkeypatch, stored, parameters, hardware, expected):
    monkeypatch.setattr(loader, "computes_bfloat16", lambda: hardware)
    assert loader._dtype("auto", CPU, {"dtype": stored}, parameters) is expected


def test_auto_says_what_it_decided(caplog):
    with caplog.at_level("INFO", logger="minipaged"):
        loader._dtype("auto", CPU, {"dtype": "float32"}, 10)
    assert "dtype='auto' is float32" in caplog.text


@pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no bfloat16 hardware, so nothing is packed")
def test_packing_changes_no_result_whatever_the_number_of_rows():
    torch.manual_seed(0)
    for bias in (False, True):
        linear = nn.Linear(48, 80, bias=bias).to(torch.bfloat16).requires_grad_(False)
        packed = PackedLinear(linear)
        for rows in (1, 3, 32, 100):
            x = torch.randn(rows, 48).to(torch.bfloat16)
            torch.testing.assert_close(packed(x), linear(x), rtol=1e-2, atol=1e-2)


def test_all_but_the_head_is_packed_and_only_bfloat16(monkeypatch):
    monkeypatch.setattr(packed_linear, "PackedLinear", lambda linear: nn.Identity())
    model = nn.ModuleDict({name: nn.Linear(4, 4).to(torch.bfloat16) for name in ("up", "lm_head")})
    model["down"] = nn.Linear(4, 4)
    pack(model)
    assert [type(layer) for layer in model.values()] == [nn.Identity, nn.Linear, nn.Linear]


@pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no bfloat16 hardware, so nothing is packed")
def test_a_loaded_model_is_packed_in_bfloat16_and_not_in_float32(tmp_path):
    save_llama(tmp_path)
    kinds = {
        dtype: any(isinstance(m, PackedLinear) for m in load_model(str(tmp_path), "cpu", dtype).model.modules())
        for dtype in ("bfloat16", "float32")
    }
    assert kinds == {"bfloat16": True, "float32": False}
