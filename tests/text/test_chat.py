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


def in_parts(*parts) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": "What is "}, *parts]}]


def test_text_parts_are_joined():
    tokenizer = byte_level()
    whole = render_chat(tokenizer, [{"role": "user", "content": "What is this?"}])
    assert render_chat(tokenizer, in_parts({"type": "text", "text": "this?"})) == whole


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
        (in_parts({"type": "image_url", "image_url": {"url": "…"}}), r"messages\[0\]: content\[1\] is an image \(type"),
        (
            in_parts({"type": "image", "image": "cat.png"}),
            r"is an image \(type 'image'\), and the model reads only text",
        ),
        (in_parts({"type": "input_audio"}), "is audio"),
        (in_parts({"type": "video_url"}), "is a video"),
        (in_parts({"type": "tool_result"}), "is no text \\(type 'tool_result'\\)"),
        (in_parts({"type": "text", "text": 3}), "text must be a string, not 3"),
        (in_parts({"type": "text", "text": "x", "cache": 1}), "unknown keys: cache"),
        (in_parts("text"), r"content\[1\] must be a part such as"),
        ([{"role": "user", "content": []}], "content must be a string, or a list of text parts"),
        ([{"role": "assistant", "content": "x"}], "the user speaks first"),
    ],
)
def test_messages_of_the_wrong_shape_are_refused(messages, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        render_chat(byte_level(), messages)


def test_a_model_that_cannot_chat_says_so():
    with pytest.raises(InvalidRequest, match="no chat template"):
        render_chat(sentencepiece_like(), [{"role": "user", "content": "hi"}])
