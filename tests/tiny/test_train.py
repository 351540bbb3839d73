"""The training script, end to end, with a model of a few thousand numbers."""

import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from minipaged.tiny.train import learning_rate, train


def test_quick_training_lowers_the_loss_and_writes_a_loadable_model(tmp_path):
    entries = train(tmp_path / "weights", tmp_path / "log.jsonl", steps=40, minutes=5, quick=True)
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.3
    assert set(entries[-1]["held_out"]) == {"story", "chat", "numbers"}
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == entries
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "weights")
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def test_the_learning_rate_rises_and_falls():
    assert learning_rate(0.0, 1.0) < 0.1 < learning_rate(0.02, 1.0) < learning_rate(0.03, 1.0)
    assert learning_rate(0.5, 1.0) > learning_rate(0.9, 1.0) > learning_rate(1.0, 1.0) > 0
