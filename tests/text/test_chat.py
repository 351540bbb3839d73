"""Chat messages to prompt tokens."""

from __future__ import annotations

import pytest

from minipaged.errors import InvalidRequest
from minipaged.text import render_chat
from tests.text.tokenizers_for_tests import byte_level, sentencepiece_like


def test_it_follows_the_template_and_opens_the_assistants_turn():
    tokenizer = byte_level()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi 🙂"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    token_ids = render_chat(tokenizer, messages)
    expected = "<|system|>Be brief.<|end|><|user|>Hi 🙂<|end|><|assistant|>Hello.<|end|><|user|>Bye<|end|><|assistant|>"
    assert tokenizer.decode(token_ids) == expected
    assert token_ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], "role must be one of"),
        ([{"role": "tool", "content": "x"}], "role must be one of"),
        ([{"role": "user"}], "content must be a string"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], r"messages\[1\]: content"),
        ([{"role": "user", "content": "x", "name": "y"}], "unknown keys: name"),
        ([{"role": "assistant", "content": "x"}], "the user speaks first"),
    ],
)
def test_messages_of_the_wrong_shape_are_refused(messages, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        render_chat(byte_level(), messages)


def test_a_model_that_cannot_chat_says_so():
    with pytest.raises(InvalidRequest, match="no chat template"):
        render_chat(sentencepiece_like(), [{"role": "user", "content": "hi"}])
