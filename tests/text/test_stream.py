"""The incremental detokenizer against the tokenizer's decoding of the whole sequence."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minipaged.text import TextStream
from minipaged.text.stream import MAX_WINDOW, REPLACEMENT, decode
from tests.text.tokenizers_for_tests import byte_level, sentencepiece_like

FAMILIES = [byte_level, sentencepiece_like]
UNLIKELY = st.sampled_from(["🙂", "👩‍👩‍👧", "🏳️‍🌈", "é", "é", "你好", "。", "\n", "  ", " ", "▁", "the quick", "\x00"])
# Surrogates are not valid text. U+FFFD has its own tests, because it looks like an incomplete character.
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters=REPLACEMENT)
TEXT = st.lists(st.one_of(UNLIKELY, st.text(CHARACTERS, max_size=4)), max_size=12).map("".join)
STOPS = st.lists(st.text(st.sampled_from("ab e🙂\n"), min_size=1, max_size=4), max_size=3).map(tuple)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stream(tokenizer, token_ids, stop=(), prompt=()):
    """Pushes all tokens. Returns the pieces of text and the stream."""
    text_stream = TextStream(tokenizer, list(prompt), stop)
    pieces = []
    for token_id in token_ids:
        pieces.append(text_stream.push(token_id))
        if text_stream.stopped is not None:
            break
    pieces.append(text_stream.finish())
    return pieces, text_stream


def cut(text, stops):
    """``text`` before the stop string that is completed first (the longer one of two), and that string."""
    hits = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return (text[: min(hits)[1]], min(hits)[2]) if hits else (text, None)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXT, prompt=st.one_of(st.just(""), TEXT), stops=STOPS)
@example(text="€" * 30, prompt="", stops=())
@example(text="a🙂b", prompt="🙂", stops=("🙂b",))
@example(text=" a", prompt="x", stops=())
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_whole_decoding_cut_at_the_stop(family, text, prompt, stops):
    tokenizer = family()
    prompt_ids, token_ids = encode(tokenizer, prompt), encode(tokenizer, text)
    pieces, text_stream = stream(tokenizer, token_ids, stops, prompt_ids)
    both, before = decode(tokenizer, prompt_ids + token_ids), decode(tokenizer, prompt_ids)
    expected, stopped = cut(both[len(before) :], stops)
    assert "".join(pieces) == text_stream.text == expected
    assert text_stream.stopped == stopped
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_tokens_at_all_byte_level(data):
    """Models may generate invalid UTF-8; the result still equals the decoding of the whole sequence."""
    tokenizer = byte_level()
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 5), max_size=60))
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_tokens_at_all_byte_fallback(data):
    """This tokenizer turns a whole run of bytes into U+FFFD if its end is invalid. The stream has output the valid
    characters by then, so results can only be compared if there is no such run."""
    tokenizer = sentencepiece_like()
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 5), max_size=60))
    pieces, _ = stream(tokenizer, token_ids)
    expected = decode(tokenizer, token_ids)
    if REPLACEMENT in expected:
        assert REPLACEMENT in "".join(pieces)
    else:
        assert "".join(pieces) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_incomplete_tail_is_flushed_once(family):
    tokenizer = family()
    token_ids = encode(tokenizer, "ab𝄞")[:-1]
    text_stream = TextStream(tokenizer, [])
    pieces = [text_stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) == "ab"
    tail = text_stream.finish()
    assert tail and not tail.strip(REPLACEMENT)
    assert text_stream.text == decode(tokenizer, token_ids)
    assert text_stream.finish() == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_that_never_become_text_are_not_held_forever(family):
    tokenizer = family()
    lead_byte = encode(tokenizer, "𝄞")[-4:][0]  # must be followed by three more bytes, which are missing
    text_stream = TextStream(tokenizer, [])
    for count in range(1, 200):
        text_stream.push(lead_byte)
        assert count - 3 <= len(text_stream.text) <= count
        assert len(text_stream._window) <= MAX_WINDOW
    text_stream.finish()
    assert text_stream.text == REPLACEMENT * 199


@pytest.mark.parametrize("repeat", [1, 2, 9, 40])
def test_text_that_really_contains_the_replacement_character(repeat):
    tokenizer = byte_level()
    text = REPLACEMENT * repeat + "ok" + REPLACEMENT
    assert stream(tokenizer, encode(tokenizer, text))[1].text == text


def test_tokens_that_straddle_characters():
    """€€€… in tokens that all end inside a character, so that no boundary of tokens is one of characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    alphabet = {"a": 0, "â": 1, "Ĥ": 2, "¬": 3, "Ĥ¬": 4, "Ĥ¬â": 5}  # GPT-2 writes the bytes of € as â Ĥ ¬
    raw = Tokenizer(models.BPE(alphabet, [("Ĥ", "¬"), ("Ĥ¬", "â")]))
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    pieces, text_stream = stream(tokenizer, [0, 1] + [5] * 100 + [4, 0])
    assert text_stream.text == "a" + "€" * 101 + "a"
    assert set(pieces[2:-3]) == {"€"}
    assert len(text_stream._window) <= MAX_WINDOW


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_skipped(family):
    tokenizer = family()
    halves = encode(tokenizer, "one🙂two")
    token_ids = [part for token_id in halves for part in (token_id, tokenizer.eos_token_id)]
    assert stream(tokenizer, token_ids)[1].text == "one🙂two"


def test_a_long_text_costs_the_same_per_token():
    tokenizer = byte_level()
    text_stream = TextStream(tokenizer, encode(tokenizer, "the " * 500))
    for token_id in encode(tokenizer, "the quick brown 🙂 fox, 你好 " * 200):
        text_stream.push(token_id)
        assert len(text_stream._window) <= MAX_WINDOW


def test_a_stop_string_is_held_back_while_it_may_still_come():
    tokenizer = byte_level()
    text_stream = TextStream(tokenizer, [], ("###", "\nUser:"))
    shown = [text_stream.push(token_id) for token_id in encode(tokenizer, "a##") + encode(tokenizer, "b\n")]
    assert "".join(shown) == "a##b"
    assert text_stream.stopped is None
    assert text_stream.finish() == "\n"


def test_nothing_follows_a_stop_or_the_end():
    tokenizer = byte_level()
    (token_id,) = encode(tokenizer, "x")
    stopped = TextStream(tokenizer, [], ("x",))
    assert stopped.push(token_id) == "" and stopped.stopped == "x"
    with pytest.raises(RuntimeError, match="ended"):
        stopped.push(token_id)
    assert stopped.finish() == stopped.text == ""

    finished = TextStream(tokenizer, [])
    finished.finish()
    with pytest.raises(RuntimeError, match="ended"):
        finished.push(token_id)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXT, left=TEXT, right=TEXT)
@settings(max_examples=100, deadline=None)
def test_forks_are_independent(family, text, left, right):
    tokenizer = family()
    first = TextStream(tokenizer, [], ("ab",))
    common = encode(tokenizer, text)
    for token_id in common:
        if first.stopped is None:
            first.push(token_id)
    second = first.fork()
    for text_stream, more in ((first, left), (second, right)):
        own = encode(tokenizer, more)
        for token_id in own:
            if text_stream.stopped is None:
                text_stream.push(token_id)
        text_stream.finish()
        assert text_stream.text == stream(tokenizer, common + own, ("ab",))[1].text


# --- stop strings with special tokens -----------------------------------------------------------------------------


def test_a_stop_string_that_is_a_special_token_stops():
    tokenizer = byte_level()
    pieces, text_stream = stream(tokenizer, [*encode(tokenizer, "hi"), 2, *encode(tokenizer, "no")], ("<|user|>",))
    assert ("".join(pieces), text_stream.stopped) == ("hi", "<|user|>")
    pieces, text_stream = stream(tokenizer, [*encode(tokenizer, "hi"), 1, *encode(tokenizer, "no")], ("<|user|>",))
    assert ("".join(pieces), text_stream.stopped) == ("hino", None)


def test_an_unfinished_character_before_such_a_stop_is_shown():
    tokenizer = byte_level()
    pieces, text_stream = stream(tokenizer, [*encode(tokenizer, "a𝄞")[:-1], 2], ("<|user|>",))
    assert ("".join(pieces), text_stream.stopped) == ("a" + REPLACEMENT, "<|user|>")


SPECIAL_STOPS = ["<|user|>", "a<|user|>", "<|user|>\n", "<|end|><|user|>", "b<|end|> a", "ab", "<|user|", "|>a"]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_stop_strings_match_the_text_and_where_they_name_special_tokens_these_too(data):
    """Against a search in two strings: the text, and the text with the special tokens that stop strings name."""
    tokenizer = byte_level()
    stops = data.draw(st.lists(st.sampled_from(SPECIAL_STOPS), min_size=1, max_size=3, unique=True))
    kinds = st.sampled_from(["a", "b", " ", "\n", "<|user|>", "<|end|>", 0, 2, 3])
    units = data.draw(st.lists(kinds, max_size=9))
    token_ids = [token for unit in units for token in ([unit] if isinstance(unit, int) else _ordinary(tokenizer, unit))]
    names = {0: "<|end|>", 2: "<|user|>"}
    marks = {0: "\ud800", 2: "\ud801"}
    named = [token for token, name in names.items() if any(name in stop for stop in stops)]
    found = []  # (tokens read, end, start, stop): the first to be completed wins
    for stop in stops:
        marked = stop.replace("<|end|>", marks[0]).replace("<|user|>", marks[2])
        for wanted, visible in ((stop, ()), (marked, tuple(named))):
            if wanted == stop and visible:
                continue
            raw = ""
            for number, token in enumerate(token_ids):
                raw += marks[token] if token in visible else decode(tokenizer, [token]) if token > 3 else ""
                if (at := raw.find(wanted)) >= 0:
                    ends = (raw[: at + len(wanted)], raw[:at])
                    lengths = (len(part) - sum(map(part.count, marks.values())) for part in ends)
                    found.append((number, *lengths, stop))
                    break
    whole = decode(tokenizer, token_ids)
    pieces, text_stream = stream(tokenizer, token_ids, tuple(stops))
    expected = (whole[: min(found)[2]], min(found)[3]) if found else (whole, None)
    assert ("".join(pieces), text_stream.stopped) == expected


def _ordinary(tokenizer, text):
    """Tokens of the text's characters, of which none is special, even if the text is a special token's name."""
    return [token for char in text for token in encode(tokenizer, char)]
