"""The dtype that ``dtype="auto"`` chooses on a CPU, with and without bfloat16 hardware."""

import pytest
import torch

from minipaged.models import loader
from minipaged.models.loader import LARGE

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "stored, parameters, hardware, expected",
    [
        ("bfloat16", LARGE, True, torch.bfloat16),
        ("bfloat16", LARGE, False, torch.float32),  # emulated: slower than float32
        ("bfloat16", LARGE - 1, True, torch.float32),
        ("float32", LARGE, True, torch.float32),  # weights are not rounded unless the user asks for it
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
