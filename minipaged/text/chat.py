"""Chat templates: converts a list of chat messages into prompt tokens in the format the model was trained on."""

from __future__ import annotations

from typing import Any

from minipaged.errors import InvalidRequest
from minipaged.text.parts import text_of

ROLES = ("system", "user", "assistant")


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Prompt tokens for the assistant's next turn, formatted by the model's own chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: ``[{"role": "system" | "user" | "assistant", "content": "…"}, …]``, oldest first. The content may
            be a list of OpenAI's text parts.

    Raises:
        InvalidRequest: if messages have another shape or the template refuses them; also if the model has no
            chat template, that is, was not trained to chat.
    """
    messages = _validated(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest("this model has no chat template; give it a plain prompt, or load a chat model")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs and can raise any error
        raise InvalidRequest(f"the model's chat template refused these messages: {error}") from error
    # The template already contains all special tokens; the tokenizer must not add a second beginning-of-text token.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _validated(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages must be a list with at least one message, not {messages!r}")
    plain = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} must be a dict with 'role' and 'content', not {message!r}")
        if unknown := sorted(set(message) - {"role", "content"}, key=str):
            raise InvalidRequest(f"{where} has unknown keys: {', '.join(map(str, unknown))}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRequest(f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}")
        plain.append({"role": role, "content": text_of(content, f"{where}: ")})
    return plain
