"""Fixtures with small random checkpoints of every model family, written by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.models.families import config_of, randomize


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Uses one thread: waking threads takes longer than computing models this small, 10 times on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → directory of its checkpoint, made once per session. A test that changes one must copy it first."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model = transformers.AutoModelForCausalLM.from_config(config_of(family))
            randomize(model)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def hugging_face(checkpoint: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    """family → transformers' own model, loaded from the checkpoint."""
    loaded: dict[str, torch.nn.Module] = {}

    def load(family: str) -> torch.nn.Module:
        if family not in loaded:
            loaded[family] = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(family), attn_implementation="eager", dtype=torch.float32
            ).eval()
        return loaded[family]

    return load
