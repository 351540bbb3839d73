"""What loading a model costs besides its weights: imports, a second copy of the weights, silence."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from minipaged.models import loader
from minipaged.models.loader import load_model
from tests.checkpoints import save_llama
from tests.models.gguf_files import small_llama, write
from tests.text.tokenizers_for_tests import byte_level, sentencepiece_like

LOAD = """
import sys, torch
from transformers import AutoTokenizer
slow = {"sympy", "torch._dynamo"} - {*sys.modules}
from minipaged import LLM
LLM("tiny", device="cpu")
print(slow & {*sys.modules})
"""


def test_loading_imports_nothing_slow_but_torch_and_the_tokenizer():
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Directories with a tokenizer of each kind."""
    found = {}
    for name, make in (("byte-level", byte_level), ("sentencepiece", sentencepiece_like)):
        found[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(found[name])
    return found


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "granite", "unheard-of"])
@pytest.mark.parametrize(
    "named",
    ["TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", ""],
)  # fmt: skip
def test_the_tokenizer_is_the_one_that_transformers_would_choose(tokenizers, kind, model_type, named, tmp_path):
    for file in tokenizers[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    about.pop("tokenizer_class")
    about |= {"tokenizer_class": named} if named else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = (
        loader._load_tokenizer(tmp_path, None),
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
    )
    text = "The quick brown fox, naïve café 🙂 "
    assert type(ours) is type(theirs) and ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == theirs.decode(ours(text)["input_ids"])


def test_pages_of_the_file_are_dropped_as_soon_as_a_tensor_is_copied(tmp_path, monkeypatch):
    save_llama(tmp_path, vocab_size=1 << 14)
    advised, advise = [], loader._advise

    def note(tensor, advice):
        advised.append((advice, tensor.nbytes))
        advise(tensor, advice)

    monkeypatch.setattr(loader, "_advise", note)
    model = load_model(str(tmp_path), "cpu", "float32").model
    dropped = sum(size for advice, size in advised if advice == "MADV_DONTNEED")
    assert dropped == sum(view.nbytes for _, view in model.checkpoint_views())
    assert all(hasattr(mmap, advice) for advice, _ in advised) or sys.platform != "linux"


def test_slow_loading_shows_its_progress(tmp_path, monkeypatch, capsys):
    save_llama(tmp_path)
    load_model(str(tmp_path), "cpu")
    assert "loading" not in capsys.readouterr().err, "it was quick"
    monkeypatch.setattr(loader, "PATIENCE", 0)
    load_model(str(tmp_path), "cpu")
    assert f"loading {tmp_path.name}: " in capsys.readouterr().err


def test_slow_loading_of_a_gguf_file_shows_its_progress(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "small.gguf", *small_llama())
    monkeypatch.setattr(loader, "PATIENCE", 0)
    load_model(str(file), "cpu")
    assert f"loading {file.name}: " in capsys.readouterr().err
