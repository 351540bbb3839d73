"""Small random checkpoints in Hugging Face format, and the tokens that transformers generates with them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB = 300


def save_llama(directory: Path, **overrides: object) -> Path:
    """Saves a random Llama of 3 layers with grouped-query attention, with weights so large that logits never tie."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    model.save_pretrained(directory)
    return directory


def transformers_greedy(directory: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Tokens that transformers generates greedily, including the end-of-text token."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, use_cache=True
        )
    return out[0, len(prompt) :].tolist()
