"""A model's own sampling parameters: what ``generation_config.json`` says about temperature, filters and penalty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minipaged.core.params import SamplingParams  # how the next token is chosen
from minipaged.errors import InvalidRequest, ModelError

# The fields that vLLM reads with ``generation_config="auto"``. Like vLLM, minipaged does not read ``do_sample``, which
# most chat models leave out: ``temperature=0`` asks for greedy decoding.
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CHAT_TEMPERATURE = 0.7  # of chats in the terminal and on the page, if the model states no sampling parameter


def stated(generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sampling parameters that a generation config states. Null means unstated; ``top_k: -1`` keeps all tokens."""
    values = {name: (generation_config or {}).get(name) for name in FIELDS}
    if values["top_k"] == -1:
        values["top_k"] = 0
    return {name: value for name, value in values.items() if value is not None}


def check(generation_config: Mapping[str, Any], file: Path) -> None:
    """Raises `ModelError`, which names the file, if `SamplingParams` refuses one of the stated values."""
    try:
        SamplingParams(**stated(generation_config))
    except InvalidRequest as error:
        raise ModelError(f"{file}: {error}; correct or remove this value") from None


def describe(params: SamplingParams, generation_config: Mapping[str, Any] | None, given: Mapping[str, Any]) -> str:
    """One line for the start: the sampling parameters in use, and where each comes from.

    >>> describe(SamplingParams(temperature=0.7), {"temperature": 0.7}, {})
    'sampling: temperature 0.7 — from generation_config.json'
    """
    own = stated(generation_config)
    sources = {"as given": set(given), "from generation_config.json": set(own) - set(given)}
    sources["the default"] = {"temperature"} - set(own) - set(given)
    groups = []
    for source, names in sources.items():
        values = [f"{name} {getattr(params, name):g}" for name in FIELDS if name in names]
        groups += [f"{', '.join(values)} — {source}"] if values else []
    return f"sampling: {'; '.join(groups)}"
