"""The training script, end to end, with a model of a few thousand parameters."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minipaged.tiny.train import QUICK_SHAPE, learning_rate, loss_of, positions_in_documents, train


def test_quick_training_lowers_the_loss_and_writes_a_loadable_model(tmp_path):
    entries = train(tmp_path / "weights", tmp_path / "log.jsonl", steps=(20, 20), quick=True)
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.3
    assert set(entries[-1]["held_out"]) == {"story", "chat", "numbers"}
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == entries
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "weights")
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    def run(name: str) -> list[float]:
        return [entry["loss"] for entry in train(tmp_path / name, tmp_path / f"{name}.jsonl", (20, 20), quick=True)]

    whole = run("whole")
    done = []

    def interrupt(*args, **kwargs):
        done.append(1)
        if len(done) > 25:
            raise KeyboardInterrupt
        return loss_of(*args, **kwargs)

    monkeypatch.setattr("minipaged.tiny.train.loss_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="other options"):
        train(tmp_path / "parts", tmp_path / "parts.jsonl", (20, 30), quick=True)
    assert run("parts") == pytest.approx(whole, abs=0.02)
    assert "continuing after step 20" in capsys.readouterr().out
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == len(whole)
    assert not list(tmp_path.glob("*.pt"))


def test_isolated_documents_do_not_see_each_other():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            num_hidden_layers=2,
            bos_token_id=0,
            **{key: value for key, value in QUICK_SHAPE.items() if key != "num_hidden_layers"},
        )
    ).eval()
    row = torch.tensor([[0, 7, 8, 9, 0, 5, 6, 7, 8]])
    positions = positions_in_documents(row, eot=0)
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    together = model(input_ids=row, position_ids=positions, use_cache=False).logits[:, 4:]
    alone = model(input_ids=row[:, 4:], use_cache=False).logits
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_learning_rate_rises_and_falls():
    assert learning_rate(0.0, 1.0) < 0.1 < learning_rate(0.02, 1.0) < learning_rate(0.03, 1.0)
    assert learning_rate(0.5, 1.0) > learning_rate(0.9, 1.0) > learning_rate(1.0, 1.0) > 0
