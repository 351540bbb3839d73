"""Small tokenizers of both families (byte-level, SentencePiece), trained here so that tests need no download."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. A block table maps logical blocks to physical ones.",
    "Paged attention keeps keys and values in blocks, much as an operating system keeps pages.",
    "Der Fuß über dem Fluß, señor, naïve café. Привет, мир! 你好,世界。 今日は 🙂🙂 👩‍👩‍👧 🏳️‍🌈",
] * 4

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@cache
def byte_level(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's and Llama 3's, which works on bytes, so a token may contain part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: spaces become "▁", the decoder drops the first, unknown characters become bytes."""
    words = [word for line in CORPUS for word in line.split() if word.isascii()]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=list(special.values()), show_progress=False)
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(["▁" + word for word in words], trainer)
    learned = json.loads(trained.to_str())["model"]
    vocab = learned["vocab"]
    for byte in range(256):  # byte fallback needs these in the vocabulary
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's, with a decoder for Metaspace; characters that it does not know become bytes."""
    alphabet = sorted({char for line in CORPUS for char in line if char.isascii()} - {" "})
    words = ["▁the", "▁a", "ing", "▁block", "quick", "▁"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((word, -3.0) for word in words)]
    pieces += [(char, -5.0) for char in alphabet] + [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer like BERT's: "##" continues a word, and the decoder puts a space before every other token."""
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
