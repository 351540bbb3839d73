"""The content of a chat message: a string, or OpenAI's list of parts, of which a model of text reads the texts."""

from __future__ import annotations

from typing import Any

from minipaged.errors import InvalidRequest

# What a part's type names → in words.
OTHER_KINDS = {"image": "an image", "audio": "audio", "video": "a video", "file": "a file"}


def text_of(content: Any, where: str = "") -> str:
    """The text of a message's content; text parts are joined. ``where``: put before the message of an error.

    Raises InvalidRequest for anything that is no text, which names it: no model here reads images, audio, video, files.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where}content must be a string, or a list of text parts, not {content!r}")
    return "".join(_text_of_part(part, f"{where}content[{number}]") for number, part in enumerate(content))


def _text_of_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f'{where} must be a part such as {{"type": "text", "text": "…"}}, not {str(part)[:80]}')
    kind = part["type"]
    if kind != "text":
        what = next((words for word, words in OTHER_KINDS.items() if word in kind), "no text")
        raise InvalidRequest(f"{where} is {what} (type {kind!r}), and the model reads only text; leave this part out")
    if unknown := sorted(set(part) - {"type", "text"}, key=str):
        raise InvalidRequest(f"{where} has unknown keys: {', '.join(map(str, unknown))}")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where}: text must be a string, not {part.get('text')!r}")
    return str(part["text"])
