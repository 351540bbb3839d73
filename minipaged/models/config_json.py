"""Reads values of a parsed ``config.json``: numbers that a model needs, options that must have their defaults."""

from __future__ import annotations

from typing import Any

from minipaged.errors import ModelError


def need(config: dict[str, Any], key: str, kind: type[int] | type[float] = int, default: float | None = None) -> Any:
    """Reads a positive number from ``config.json``. Raises ModelError if it is not one, or missing without default."""
    value = default if config.get(key) is None else config[key]
    allowed = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < float("inf"):
        raise ModelError(f"config.json: {key} must be a positive number, but is {value!r}")
    return value


def require_plain(config: dict[str, Any], **plain: Any) -> None:
    """Rejects options that would change results. ``plain``: option → its default, the only supported value.

    A silently ignored option gives wrong results that look right. Raises ModelError with the option's name.
    """
    for key, value in plain.items():
        given = config.get(key)
        if given is not None and given != value:
            raise ModelError(f"config.json: {key} = {given!r} is not supported, only {value!r}")


def flag(config: dict[str, Any], key: str, default: bool = False) -> bool:
    """Reads true or false from ``config.json``. Raises ModelError for anything else: "false" would count as true."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, but is {value!r}")
    return value
