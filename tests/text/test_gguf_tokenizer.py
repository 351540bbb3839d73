"""Tokenizers out of GGUF files: the same ids as the tokenizers they were written from, and as a slow oracle."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from minipaged import LLM
from minipaged.errors import ModelError
from minipaged.models.gguf import GGUFFile
from minipaged.text import render_chat
from minipaged.text.gguf_tokenizer import GPT_2, LLAMA_3, QWEN_2, SPLITS, gguf_tokenizer
from tests.models.gguf_files import random_data, small_llama, write
from tests.text.tokenizers_for_tests import CHAT_TEMPLATE, CORPUS, byte_level, sentencepiece_like

TEXTS = [
    *CORPUS[:3],
    "It's 2024-11-30, 12345.678 (or 3½)!  Two  spaces,\ttabs\r\n\r\n  and lines.\n",
    "don't DON'T I'LL we'Re x='s' <=> $a+b~c|d`e` UPPERlowerTitle camelCase",
    "   ", "", " a", "\n", "½²٣ १२३ 数字１２３", "e\u0301\u0301 ﬁ ß İ ǅ", "a<|end|> b<|user|>",
    "日本語 and 한국어\u3000!",
]  # fmt: skip


def file_of(path: Path, **changes: Any) -> GGUFFile:
    """A file with this tokenizer; ``None`` leaves a key out. Its embeddings have as many rows as there are tokens."""
    keys = {f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items() if value is not None}
    metadata, tensors = small_llama(**keys)
    tokens = keys.get("tokenizer.ggml.tokens", [])
    metadata["llama.vocab_size"] = len(tokens) or 40
    tensors["token_embd.weight"] = random_data("Q8_0", (metadata["llama.vocab_size"], 256))
    return GGUFFile(write(path / "model.gguf", metadata, tensors))


def bpe(**changes: Any) -> dict[str, Any]:
    """The metadata for `byte_level`."""
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    specials = {token: i for i, token in enumerate(tokens) if token.startswith("<|")}
    return dict(
        ggml__model="gpt2",
        ggml__pre="gpt-2",
        ggml__tokens=tokens,
        ggml__token_type=[3 if token in specials else 1 for token in tokens],
        ggml__merges=[" ".join(merge) for merge in model["merges"]],
        ggml__eos_token_id=specials["<|end|>"],
        chat_template=CHAT_TEMPLATE,
    ) | {name.replace(".", "__"): value for name, value in changes.items()}


def spm(**changes: Any) -> dict[str, Any]:
    """The metadata for `sentencepiece_like`: the earlier a token was learned, the higher is its score."""
    vocab = json.loads(sentencepiece_like().backend_tokenizer.to_str())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    types = [kinds.get(token, 6 if token.startswith("<0x") else 1) for token in tokens]
    return dict(
        ggml__model="llama",
        ggml__pre="default",
        ggml__tokens=tokens,
        ggml__token_type=types,
        ggml__scores=[-float(i) if kind == 1 else 0.0 for i, kind in enumerate(types)],
        ggml__bos_token_id=vocab["<s>"],
        ggml__eos_token_id=vocab["</s>"],
        ggml__unknown_token_id=vocab["<unk>"],
    ) | {name.replace(".", "__"): value for name, value in changes.items()}


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def test_a_byte_level_tokenizer_is_the_one_the_file_was_made_of(tmp_path):
    tokenizer, original = gguf_tokenizer(file_of(tmp_path, **bpe())), byte_level()
    for text in TEXTS:
        assert ids(tokenizer, text) == ids(original, text), text
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer.eos_token == "<|end|>" and tokenizer.bos_token is None
    assert tokenizer.decode(ids(tokenizer, "a<|end|>b"), skip_special_tokens=True) == "ab"
    messages = [{"role": "user", "content": "Hi <|end|>"}]
    assert render_chat(tokenizer, messages) == render_chat(original, messages)


def pieces(splits: tuple[str, ...], text: str) -> list[str]:
    sequence = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated") for split in splits])
    return [piece for piece, _ in sequence.pre_tokenize_str(text)]


def test_splits_are_those_of_the_models_own_tokenizers():
    """Where transformers or tokenizers has a model's rule, under whatever name, ours gives the same pieces."""
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping", reason="this transformers has no table of splits"
    )
    known = getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if known is None:
        pytest.skip("this version of transformers splits every text by GPT-2's rule")
    both = sorted(known.keys() & SPLITS.keys())
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= set(both)
    for name in both:
        for text in TEXTS:
            assert pieces(SPLITS[name], text) == pieces((known[name],), text), (name, text)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        (
            "deepseek-coder",
            [
                *[pre_tokenizers.Split(Regex(one), "isolated") for one in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")],
                pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
        ),
    ],
)
def test_splits_are_those_of_published_tokenizer_files(name, rule):
    theirs = pre_tokenizers.Sequence(rule) if isinstance(rule, list) else rule
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    mine = pre_tokenizers.Sequence(
        [*[pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]], letters]
    )
    for text in TEXTS:
        assert mine.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm", ["  ", "2", "0", "2", "4", " it", "'s", " (", "a", ")"]),
        ("gpt-2", [" ", " 2024", " it", "'s", " (", "a", ")"]),
        ("llama-bpe", [" ", " ", "202", "4", " it", "'s", " (", "a", ")"]),
        ("qwen2", [" ", " ", "2", "0", "2", "4", " it", "'s", " (", "a", ")"]),
        ("default", [" ", " ", "202", "4", " it", "'", "s", " ", "(", "a", ")"]),
    ],
)
def test_a_text_as_llama_cpp_splits_it(name, expected):
    assert pieces(SPLITS[name], "  2024 it's (a)") == expected
    assert SPLITS["phi-2"] == (GPT_2,) and SPLITS["smaug-bpe"] == (LLAMA_3,) and SPLITS["megrez"] == (QWEN_2,)


def test_ids_follow_the_split(tmp_path):
    tokens = bpe()
    digits = {name: ids(gguf_tokenizer(file_of(tmp_path, **tokens | {"ggml__pre": name})), "a  7") for name in SPLITS}
    vocabulary = tokens["ggml__tokens"]
    assert [vocabulary[i] for i in digits["gpt-2"]] == ["a", "Ġ", "Ġ", "7"]
    assert digits["smollm"] == digits["starcoder"]


def test_llama_3_takes_whole_pieces_and_begins_with_bos(tmp_path):
    """It does not merge a piece that is a token of its own, though no merges lead there."""
    tokens = bpe()
    tokens["ggml__tokens"] = [*tokens["ggml__tokens"], "zqxw", "<|begin|>"]
    tokens["ggml__token_type"] = [*tokens["ggml__token_type"], 1, 3]
    tokens["ggml__bos_token_id"] = len(tokens["ggml__tokens"]) - 1
    plain = gguf_tokenizer(file_of(tmp_path, **tokens))
    assert len(ids(plain, "zqxw")) == 4
    tokens["ggml__pre"] = "llama-bpe"
    assert ids(gguf_tokenizer(file_of(tmp_path, **tokens)), "zqxw") == [tokens["ggml__bos_token_id"], 400]
    tokens["ggml__add_bos_token"] = False
    assert ids(gguf_tokenizer(file_of(tmp_path, **tokens)), "zqxw") == [400]


def test_kinds_of_tokens(tmp_path):
    """User-defined tokens are found whole and shown, control tokens are found whole and can be left out."""
    tokens = bpe()
    tokens["ggml__tokens"] = [*tokens["ggml__tokens"], "<think>", "", "    ", "<｜fin▁é｜>"]
    tokens["ggml__token_type"] = [*tokens["ggml__token_type"], 4, 5, 4, 3]
    tokenizer = gguf_tokenizer(file_of(tmp_path, **tokens))
    assert ids(tokenizer, "<think>    <｜fin▁é｜>") == [400, 402, 403]
    assert tokenizer.decode([400, 402, 403], skip_special_tokens=True) == "<think>    "
    assert tokenizer.get_vocab()["[EMPTY_401]"] == 401
    # A file may name an ordinary token as padding; it must not vanish from the output.
    padded = gguf_tokenizer(file_of(tmp_path, **tokens | {"ggml__padding_token_id": tokens["ggml__tokens"].index("!")}))
    assert padded.pad_token is None and padded.decode(ids(padded, "Hi!"), skip_special_tokens=True) == "Hi!"


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def merged(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's rule, slowly: of all neighbours that form a token, join those with the best score."""
    known = {token: i for i, token in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (known[a + b], at) for at, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in known
        ]
        if not pairs:
            break
        _, at = max(pairs, key=lambda pair: (scores[pair[0]], -pair[1]))
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    unknown = [[known[f"<0x{byte:02X}>"] for byte in symbol.encode()] for symbol in symbols]
    return [
        i
        for symbol, spelled in zip(symbols, unknown, strict=True)
        for i in ([known[symbol]] if symbol in known else spelled)
    ]


def test_a_sentencepiece_tokenizer_merges_by_score(tmp_path):
    keys = spm()
    tokenizer = gguf_tokenizer(file_of(tmp_path, **keys))
    bos = keys["ggml__bos_token_id"]
    for text in [*TEXTS, "  two spaces", "the the  lazy"]:
        expected = merged(text, keys["ggml__tokens"], keys["ggml__scores"])
        assert ids(tokenizer, text) == [bos, *expected], text
        assert tokenizer.decode(expected) == text
    assert tokenizer.eos_token == "</s>" and tokenizer.unk_token == "<unk>"
    assert ids(tokenizer, "</s>") == [bos, keys["ggml__eos_token_id"]]


def test_flags_of_sentencepiece(tmp_path):
    keys = spm(ggml__add_space_prefix=False, ggml__add_bos_token=False, ggml__add_eos_token=True)
    tokenizer = gguf_tokenizer(file_of(tmp_path, **keys))
    with_space = gguf_tokenizer(file_of(tmp_path, **spm(ggml__add_bos_token=False)))
    assert ids(tokenizer, " the lazy") == [*ids(with_space, "the lazy"), keys["ggml__eos_token_id"]]
    assert tokenizer.decode(ids(with_space, "the lazy")) == " the lazy"


# --- ends and refusals ------------------------------------------------------------------------------------------------


def test_ids_that_end_a_text_are_all_that_the_metadata_state(tmp_path):
    keys = bpe(ggml__eot_token_id=7, ggml__eom_token_id=8)
    end = keys["ggml__eos_token_id"]
    assert file_of(tmp_path, **keys).config()["eos_token_id"] == sorted({end, 7, 8})
    # Some files of chat models name only the token that ends documents; the template writes the one that ends turns.
    keys = bpe(ggml__eos_token_id=9)
    assert file_of(tmp_path, **keys).config()["eos_token_id"] == sorted({9, end})
    assert file_of(tmp_path, **keys | {"chat_template": "{{ messages }}"}).config()["eos_token_id"] == [9]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ggml__pre": "martian"}, "tokenizer.ggml.pre 'martian' is not supported. Supported: a.x-4.0, "),
        ({"ggml__pre": 3}, "tokenizer.ggml.pre must be str, not 3"),
        ({"ggml__model": "bert"}, "tokenizer.ggml.model 'bert' is not supported. Supported: gpt2, llama"),
        ({"ggml__token_type": [1, 2]}, "token_type must list 400 values of type int"),
        ({"ggml__tokens": [1] * 400}, "tokens must list values of type str"),
        ({"ggml__tokens": ["a" * 1001, *map(str, range(399))]}, "has a token of 1001 characters"),
        ({"ggml__tokens": ["a"] * 400}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"ggml__merges": ["ab"]}, "merges has 'ab', which is not two parts"),
        (
            {"ggml__tokens": struct.pack("<IIQ", 9, 8, 0), "ggml__token_type": None},
            "tokenizer.ggml.tokens is missing or empty",
        ),
        ({"ggml__merges": ["a zz"]}, "its tokenizer cannot be built"),
        ({"ggml__merges": "a b"}, "merges must be list"),
        ({"ggml__eos_token_id": 400}, "eos_token_id is 400, but the file has 400 tokens"),
        ({"ggml__bos_token_id": 2**32 - 1}, "bos_token_id is 4294967295, but"),
        ({"ggml__add_bos_token": 1}, "add_bos_token must be bool, not 1"),
        ({"chat_template": 1}, "chat_template must be str, not 1"),
        ({"ggml__model": "llama"}, "scores is missing"),
        ({"ggml__model": "llama", "ggml__scores": [0.5]}, "scores must list 400 values of type float"),
    ],
)
def test_a_wrong_tokenizer_is_refused_when_the_model_is_loaded(changes, match, tmp_path):
    with pytest.raises(ModelError, match=match) as caught:
        path = file_of(tmp_path, **bpe() | changes).path
        LLM(path, device="cpu", num_blocks=8)
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value)


def test_files_without_a_tokenizer(tmp_path):
    for kind in (None, "none", "no_vocab"):
        assert gguf_tokenizer(file_of(tmp_path, ggml__model=kind)) is None
