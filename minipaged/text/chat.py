"""Chat templates: converts a list of chat messages into prompt tokens in the format the model was trained on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from minipaged.errors import InvalidRequest, unicode_text
from minipaged.text.parts import text_of

ROLES = ("system", "user", "assistant")


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, str]],
    *,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Prompt tokens for the assistant's next turn, formatted by the model's own chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: ``[{"role": "system" | "user" | "assistant", "content": "…"}, …]``, oldest first. The content may
            be a list of OpenAI's text parts.
        continue_final_message: the last message is the beginning of the assistant's answer; it is left open, so that
            the model goes on with it.
        chat_template_kwargs: variables of the template, such as ``{"enable_thinking": False}`` for Qwen3.

    Raises:
        InvalidRequest: if messages have another shape or the template refuses them or does not read one of the
            variables; also if the model has no chat template, that is, was not trained to chat.
    """
    messages = _validated(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest("this model has no chat template; give it a plain prompt, or load a chat model")
    if not isinstance(continue_final_message, bool):
        raise InvalidRequest(f"continue_final_message must be True or False, not {continue_final_message!r}")
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise InvalidRequest("continue_final_message needs an assistant's message, to be continued, at the end")
    variables = _variables(tokenizer, chat_template_kwargs)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            **variables,
        )
    except Exception as error:  # templates are programs and can raise any error
        raise InvalidRequest(f"the model's chat template refused these messages: {error}") from error
    unicode_text(text, "the chat, by the model's template,")  # variables of the template hold text, too
    # The template already contains all special tokens; the tokenizer must not add a second beginning-of-text token.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _variables(tokenizer: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Checks that the template reads the variables: jinja ignores unknown ones."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InvalidRequest(f"chat_template_kwargs must map names to values, not be {given!r}")
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in given:
        if name in ours:
            raise InvalidRequest(f"chat_template_kwargs must not set {name!r}, which is an argument of the request")
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise InvalidRequest(
                f"the model's chat template does not read {name!r} of chat_template_kwargs; leave it out"
            )
    return dict(given)


def _validated(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages must be a list with at least one message, not {messages!r}")
    plain = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} must be a dict with 'role' and 'content', not {message!r}")
        if unknown := sorted(set(message) - {"role", "content"}, key=str):
            names = ", ".join(map(str, unknown)).encode("utf-8", "backslashreplace").decode()  # can be printed
            raise InvalidRequest(f"{where} has unknown keys: {names}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRequest(f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}")
        said = text_of(content, f"{where}: ")
        unicode_text(said, f"{where}: content")
        plain.append({"role": role, "content": said})
    return plain
