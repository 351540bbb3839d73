"""What single tokens add to a text: their bytes add up to it, and their offsets point into it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minipaged.text.spelling import Reader, Spelling, spelling_of
from minipaged.text.stream import REPLACEMENT, TextStream, context_of
from tests.text.tokenizers_for_tests import byte_level, metaspace, sentencepiece_like, wordpiece

FAMILIES = [byte_level, sentencepiece_like, metaspace, wordpiece]
TEXT = st.lists(
    st.one_of(
        st.sampled_from(["🙂", "👩‍👩‍👧", "🏳️‍🌈", "é", "你好", "。", "\n", " ", "the quick block", "don't.", " ,"]),
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters=REPLACEMENT), max_size=3),
    ),
    max_size=8,
).map("".join)


def generated(tokenizer, prompt, token_ids):
    """The text that the engine would give for these tokens after this prompt."""
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.push, token_ids), stream.finish()])


def reader_of(tokenizer, prompt):
    return Reader(spelling_of(tokenizer), first=not context_of(tokenizer, prompt))


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXT, prompt=TEXT)
@example(text="🙂🙂", prompt="")
@example(text="the 你好 a", prompt="the")
@example(text=" ", prompt="")
@settings(max_examples=150, deadline=None)
def test_bytes_add_up_to_the_text_and_offsets_point_into_it(family, text, prompt):
    tokenizer = family()
    prompt_ids = tokenizer(prompt)["input_ids"]
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    shown = generated(tokenizer, prompt_ids, token_ids)
    spelled = reader_of(tokenizer, prompt_ids).read(token_ids)
    spelling = spelling_of(tokenizer)
    pieces = [spelling.bytes_of(token.token_id, token.first) for token in spelled]
    assert b"".join(pieces) == shown.encode()
    sent = b""
    for token, piece in zip(spelled, pieces, strict=True):
        assert token.offset == len(sent.decode(errors="ignore")), "characters before it, without the one it begins in"
        sent += piece
        name = spelling.name(token.token_id, token.first)
        if not name.startswith("bytes:") and token.token_id not in spelling.special:
            assert name.encode() == piece
            assert shown[token.offset :].startswith(name)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_text_decode_to_what_is_shown(data):
    tokenizer = byte_level()
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 5), max_size=40))
    raw = b"".join(map(Spelling(tokenizer).bytes_of, token_ids))
    assert raw.decode(errors="replace") == generated(tokenizer, [], token_ids)


BYTE_TOKENS = [b"a", b"\xff", b"\xe4", b"\xbd", b"\xa0", b"\xf0", b"\x9f", b"\x99", b"\x82", b"\xc3", b"\xa9", b"\x80"]


@pytest.mark.parametrize("family", [sentencepiece_like, metaspace])
@given(run=st.lists(st.sampled_from([*BYTE_TOKENS, b"", b""]), max_size=12))
@example(run=[b"\xe4", b"\xbd", b"a", b"", b"\xe4", b"\xbd"])
@example(run=[b"\xc3", b"\xa9", b"\xff", b"\xc3", b"\xa9"])
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_text_leave_the_offsets_after_them_right(family, run):
    tokenizer = family()
    (word,) = tokenizer("the", add_special_tokens=False)["input_ids"][-1:]
    token_ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte.hex().upper()}>") if byte else word for byte in run]
    *_, last = reader_of(tokenizer, [word]).read([*token_ids, word])
    shown = generated(tokenizer, [word], [*token_ids, word])
    spelled = spelling_of(tokenizer).bytes_of(word).decode()
    assert shown[last.offset :] == spelled


@pytest.mark.parametrize("family", [byte_level, sentencepiece_like, metaspace])
def test_a_stream_in_parts_reads_as_the_whole(family):
    tokenizer = family()
    token_ids = tokenizer("a🙂b 你好 the", add_special_tokens=False)["input_ids"]
    whole, parts = reader_of(tokenizer, []).read(token_ids), reader_of(tokenizer, [])
    assert [token for one in token_ids for token in parts.read([one])] == whole


@pytest.mark.parametrize("family", [byte_level, sentencepiece_like, metaspace])
def test_parts_of_a_character_have_names_of_their_own(family):
    tokenizer = family()
    token_ids = tokenizer("a𝄞", add_special_tokens=False)["input_ids"][-4:]
    names = [spelling_of(tokenizer).name(token) for token in token_ids]
    assert names == ["bytes:\\xf0", "bytes:\\x9d", "bytes:\\x84", "bytes:\\x9e"]


def test_special_tokens_and_ids_beyond_the_vocabulary_add_nothing_and_have_a_name():
    tokenizer = byte_level()
    spelling = spelling_of(tokenizer)
    beyond = len(tokenizer) + 1
    assert spelling.bytes_of(tokenizer.eos_token_id) == spelling.bytes_of(beyond) == b""
    assert (spelling.name(tokenizer.eos_token_id), spelling.name(beyond)) == ("<|end|>", f"<{beyond}>")
    assert (Spelling(None).bytes_of(3), Spelling(None).name(3)) == (b"", "<3>")


def test_a_word_of_sentencepiece_has_its_space_unless_it_is_the_first():
    tokenizer = sentencepiece_like()
    (token,) = tokenizer("the", add_special_tokens=False)["input_ids"]
    spelling = spelling_of(tokenizer)
    assert (spelling.name(token), spelling.name(token, first=True)) == (" the", "the")
