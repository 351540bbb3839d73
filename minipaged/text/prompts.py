"""What is taken for a prompt: text, a list of token ids, or vLLM's dicts of either. All else is refused by its type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from numbers import Number
from typing import Any

from minipaged.errors import InvalidRequest, unicode_text

KEYS = ("prompt", "prompt_token_ids")  # of vLLM's TextPrompt and TokensPrompt


def as_prompts(prompts: Any) -> list[Any]:
    """The prompts of a call that takes one or many. Numbers in a list are the token ids of one prompt.

    Takes text, a dict, or a list, tuple or iterator of prompts or token ids; `read_prompt` then takes each of them.
    Raises `InvalidRequest`.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple, Iterator)):
        raise _refusal(prompts)
    items = list(prompts)
    return [items] if items and all(isinstance(item, Number) for item in items) else items


def read_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """The text and the token ids of a prompt, the ones that it has. Raises `InvalidRequest` by the prompt's type.

    A dict may have both: the model then reads the token ids. The engine checks the ids themselves.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one character")
        unicode_text(prompt, "the prompt")
        return prompt, None
    if isinstance(prompt, (list, tuple)):
        if wrong := [token for token in prompt if not isinstance(token, Number)]:
            raise InvalidRequest(f"a prompt's token ids are whole numbers, but one of the list is {_type(wrong[0])}")
        return None, list(prompt)
    if not isinstance(prompt, Mapping):
        raise _refusal(prompt)
    if not prompt or set(prompt) - set(KEYS):
        if "input_ids" in prompt:
            raise InvalidRequest(
                f"a prompt is not a tokenizer's whole output ({type(prompt).__name__}); give the list of its input_ids"
            )
        keys = ", ".join(map(repr, prompt)) or "none"
        raise InvalidRequest(f"a prompt that is a dict has the keys 'prompt' or 'prompt_token_ids', not {keys:.200}")
    text, tokens = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and tokens is None:
        raise InvalidRequest("a prompt that is a dict needs a 'prompt' or 'prompt_token_ids' that is not None")
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"'prompt' in a prompt must be text, not {_type(text)}")
    if tokens is not None and not isinstance(tokens, (list, tuple)):
        raise InvalidRequest(f"'prompt_token_ids' in a prompt must be a list of token ids, not {_type(tokens)}")
    text = None if text is None or (tokens is not None and not text) else read_prompt(text)[0]
    return text, None if tokens is None else list(tokens)


def _refusal(given: Any) -> InvalidRequest:
    """Why this is no prompt, and what to give instead."""
    if isinstance(given, (bytes, bytearray, memoryview)):
        advice = "decode it first, for example with prompt.decode()"
    elif isinstance(given, Set):
        advice = "it has no order; give a list"
    elif isinstance(given, Number) or getattr(given, "ndim", None) == 0:
        advice = "give token ids, which are whole numbers, in a list"
    elif hasattr(given, "tolist"):  # numpy's arrays and torch's tensors
        advice = "give the list that its method tolist() returns"
    else:
        advice = "give one of these, or a list of them"
    return InvalidRequest(
        "a prompt is text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids', "
        f"not {_type(given)}: {advice}"
    )


def _type(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
