"""What the page may ask of the engine. It comes from a browser, so nothing in it is taken on trust."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from minipaged.errors import MinipagedError
from visualizer.attention import look
from visualizer.engine_thread import EngineThread
from visualizer.scenarios import Arrival, Scenario

MAX_CHARACTERS = 20_000
MAX_SAMPLES = 4
MAX_TEMPERATURE = 2.0
MAX_RATE = 200.0  # steps per second
TIMEOUT = 30.0  # seconds for the engine's thread to get round to a command


class BadCommand(MinipagedError, ValueError):
    """A payload that makes no sense, or a value out of range; the message says which."""


class Commands:
    """Checks payloads and passes them on to the engine's thread."""

    def __init__(self, thread: EngineThread, scenario: Scenario) -> None:
        self._thread = thread
        self._scenario = scenario

    async def __call__(self, payload: Any) -> dict[str, Any]:
        """``{"ok": True, "result": …}``, or ``{"ok": False, "message": …}`` with words for the user."""
        try:
            future = self._dispatch(payload)
            return {"ok": True, "result": await asyncio.wait_for(asyncio.wrap_future(future), TIMEOUT)}
        except MinipagedError as error:
            return {"ok": False, "message": _sentence(str(error))}
        except TimeoutError:
            return {"ok": False, "message": "The engine is busy with a long step; try again in a moment."}
        except Exception as error:
            return {"ok": False, "message": f"That did not work: {type(error).__name__}: {error}"}

    def _dispatch(self, payload: Any) -> Any:
        if not isinstance(payload, dict):
            raise BadCommand("a command is an object with a field 'do'")
        match payload.get("do"):
            case "submit":
                return self._thread.submit(self._arrival(payload))
            case "abort":
                return self._thread.abort(_text(payload, "request_id", 200))
            case "fork":
                return self._thread.fork(_text(payload, "request_id", 200))
            case "attention":
                seq_id = int(_number(payload, "seq_id", "The sequence", 0, 10**9, whole=True))
                position = int(_number(payload, "position", "The position", 0, 10**9, whole=True))
                return self._thread.call(lambda: look(self._thread.engine, seq_id, position))
            case "pause":
                return self._thread.pause()
            case "resume":
                return self._thread.resume()
            case "step":
                return self._thread.step()
            case "rate":
                return self._thread.set_rate(_rate(payload.get("rate")))
            case "reset":
                return self._thread.reset()
            case "play":
                return self._thread.reset(self._scenario)
            case other:
                raise BadCommand(f"there is no command {str(other)[:40]!r}")

    def _arrival(self, payload: dict[str, Any]) -> Arrival:
        room = self._thread.engine.max_model_len
        return Arrival(
            at_step=0,
            prompt=_text(payload, "prompt", MAX_CHARACTERS),
            n=int(_number(payload, "n", "Samples", 1, MAX_SAMPLES, whole=True)),
            max_tokens=int(_number(payload, "max_tokens", "Max tokens", 1, room, whole=True)),
            temperature=_number(payload, "temperature", "Temperature", 0, MAX_TEMPERATURE),
            chat=payload.get("chat") is True,
        )


def _text(payload: dict[str, Any], name: str, limit: int) -> str:
    value = payload.get(name)
    if not isinstance(value, str):
        raise BadCommand(f"the {name} must be text")
    if len(value) > limit:
        raise BadCommand(f"The {name} has {len(value):,} characters; {limit:,} is the most this page takes.")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadCommand(f"the {name} contains half a character (a lone surrogate); please retype it")
    return value


def _number(payload: dict[str, Any], name: str, label: str, low: float, high: float, whole: bool = False) -> float:
    value = payload.get(name)
    kind = "a whole number" if whole else "a number"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if low <= value <= high and (not whole or value == int(value)):
            return value
    raise BadCommand(f"{label} must be {kind} between {low:g} and {high:g}.")


def _rate(value: Any) -> float | None:
    """Steps per second, or ``None`` ("as fast as it can") for the word ``"max"``."""
    return None if value == "max" else _number({"rate": value}, "rate", "Speed", 0.2, MAX_RATE)


def _sentence(message: str) -> str:
    message = message[:1].upper() + message[1:]
    return message if message.endswith((".", "!", "?")) else message + "."
