"""Validates the page's commands and passes them to the engine. They come from a browser, so nothing is trusted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields, replace
from typing import Any

from minipaged.config import EngineConfig, SamplingParams, num_bytes
from minipaged.errors import InvalidConfig, InvalidRequest, MinipagedError
from minipaged.events.waste import AHEAD
from visualizer.attention_weights import look
from visualizer.paced_loop import MAX_BLOCKS, PacedLoop, own_sampling
from visualizer.scenarios import SCENARIOS, Arrival, Scenario

MAX_CHARACTERS = 20_000
MAX_SAMPLES = 4
MAX_TEMPERATURE = 2.0
MAX_STOPS = 20
MAX_RATE = 200.0  # steps per second
MAX_MESSAGES = 100  # per conversation
# Upper limits of the settings that a viewer can change: the page draws every block, and memory must not run out.
LIMITS = {
    "block_size": 256,
    "num_blocks": MAX_BLOCKS,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 16384,
    "max_model_len": 1_000_000,
    "swap_blocks": 4096,
}
# Optional sampling parameters of an arrival, which viewers change rarely.
REFINED = (
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "min_tokens",
    "seed", "beam_width",
)  # fmt: skip
TIMEOUT = 30.0  # seconds until the engine's thread must have run a command


class BadCommand(MinipagedError, ValueError):
    """An invalid command: malformed, or with a value out of range; the message says which.

    ``field`` names the one field that is wrong, if there is one; the page shows the message beside it.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Commands:
    """Validates command payloads and passes them to the engine's thread."""

    def __init__(self, thread: PacedLoop, scenario: Scenario, load: Callable[..., Any] | None = None) -> None:
        """``load(**settings)`` makes the `LLM` for another model; with ``None`` the model cannot be changed."""
        self._thread = thread
        self._scenario = scenario
        self._load = load
        self._loading = False

    async def __call__(self, payload: Any) -> dict[str, Any]:
        """Returns ``{"ok": True, "result": …}``, or ``{"ok": False, "message": …}`` with a message for the user.

        If a single field of the payload is wrong, ``"field"`` names it.
        """
        try:
            if isinstance(payload, dict) and payload.get("do") == "configure":
                return {"ok": True, "result": await self._configure(payload)}
            if isinstance(payload, dict) and payload.get("do") == "check":
                return {"ok": True, "result": sorted(_sampling(payload))}  # names of the parameters that will apply
            future = self._dispatch(payload)
            return {"ok": True, "result": await asyncio.wait_for(asyncio.wrap_future(future), TIMEOUT)}
        except MinipagedError as error:
            field = getattr(error, "field", "")
            return {"ok": False, "message": _sentence(str(error))} | ({"field": field} if field else {})
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
                return self._play(payload)
            case "asks":
                return self._thread.set_asking(payload.get("asks") is True)
            case "answer":
                return self._thread.answer(int(_number(payload, "id", "The question", 0, 1e9, whole=True)))
            case "chat":
                return self._thread.submit(self._turn(payload))
            case other:
                raise BadCommand(f"there is no command {str(other)[:40]!r}")

    def _arrival(self, payload: dict[str, Any]) -> Arrival:
        room = self._thread.engine.max_model_len
        arrival = Arrival(
            at_step=0,
            prompt=_text(payload, "prompt", MAX_CHARACTERS),
            n=int(_number(payload, "n", "Samples", 1, MAX_SAMPLES, whole=True)),
            max_tokens=int(_number(payload, "max_tokens", "Max tokens", 1, room, whole=True)),
            temperature=_number(payload, "temperature", "Temperature", 0, MAX_TEMPERATURE),
            chat=payload.get("chat") is True,
            **(self._own(payload) | _sampling(payload)),
        )
        arrival.params()  # raises InvalidRequest for invalid values
        if (arrival.beam_width or 1) > MAX_SAMPLES:
            raise BadCommand(f"Beams must be at most {MAX_SAMPLES}.")
        return arrival

    def _own(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The model's own values of the optional parameters. A beam search, which does not sample, takes none."""
        own = {} if payload.get("beam_width") else own_sampling(self._thread.llm)
        return {name: value for name, value in own.items() if name in REFINED}

    def _turn(self, payload: dict[str, Any]) -> Arrival:
        """The request for a conversation's next answer. The page sends all messages; the server keeps none."""
        messages = payload.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise BadCommand("the messages must be a list of objects")
        if len(messages) > MAX_MESSAGES:
            raise BadCommand(f"This conversation has more than {MAX_MESSAGES} messages; begin a new one.")
        said = [
            {"role": _text(message, "role", 20), "content": _text(message, "content", MAX_CHARACTERS)}
            for message in messages
        ]
        if sum(len(message["content"]) for message in said) > MAX_CHARACTERS:
            raise BadCommand(f"This conversation has more than {MAX_CHARACTERS:,} characters; begin a new one.")
        if said[-1]["role"] != "user":
            raise BadCommand("the last message must be the user's")
        arrival = self._arrival(payload | {"prompt": said[-1]["content"], "n": 1, "beam_width": None})
        return replace(arrival, messages=tuple(said))

    def _play(self, payload: dict[str, Any]) -> Future[None]:
        """Plays the scenario named in the payload; without a name, the last one again, with the current settings."""
        if payload.get("scenario") is None:
            return self._thread.reset(replace(self._scenario, settings={}))
        key = _text(payload, "scenario", 40)
        if key not in SCENARIOS:
            raise BadCommand(f"there is no scenario {key!r}")
        self._scenario = SCENARIOS[key]
        return self._thread.reset(self._scenario)

    async def _configure(self, payload: dict[str, Any]) -> str:
        """Restarts with a new engine. Another model is loaded in a separate thread while the old engine runs on."""
        if self._loading:
            raise BadCommand("a model is being loaded already; wait for it")
        old = self._thread.engine.config
        config = _config(payload, old)
        llm = None
        if config.model != old.model:
            if self._load is None:
                raise BadCommand(
                    "this page is open to other machines, so its model is chosen where it is started: "
                    "minipaged visualize --model …"
                )
            self._loading = True
            try:
                await asyncio.wrap_future(self._thread.set_loading(config.model))
                settings = {field.name: getattr(config, field.name) for field in fields(config)}
                llm = await asyncio.to_thread(self._load, **settings)
            finally:
                self._loading = False
                self._thread.set_loading("")
        await asyncio.wait_for(asyncio.wrap_future(self._thread.configure(config, llm)), TIMEOUT)
        engine = self._thread.engine
        words = f"Restarted with {engine.num_blocks} blocks of {engine.memory.block_size} tokens"
        manager = "" if engine.config.memory == "paged" else f", memory by {engine.config.memory}"
        return words + manager + ("." if engine.config.batching == "continuous" else ", in static batches.")


def _config(payload: dict[str, Any], old: EngineConfig) -> EngineConfig:
    """The old configuration updated with the payload's settings. Raises `InvalidConfig` for invalid settings."""
    changes: dict[str, Any] = {}
    for name, most in LIMITS.items():
        if payload.get(name) is not None:
            changes[name] = int(_number(payload, name, name.replace("_", " "), 1, most, whole=True))
    for name in ("block_size", "max_model_len"):
        if payload.get(name, 0) is None:
            changes[name] = None  # the default of the memory manager or the model
    if payload.get("kv_memory"):
        try:
            changes["kv_memory"] = num_bytes(_text(payload, "kv_memory", 40), "KV memory")
        except InvalidConfig as error:
            raise BadCommand(str(error), "kv_memory") from None
        changes.setdefault("num_blocks", None)
    if "model" in payload:
        changes["model"] = _text(payload, "model", 300).strip()
    for name in ("memory", "batching", "preemption", "enable_prefix_caching"):
        if name in payload:
            changes[name] = payload[name]
    if changes.get("preemption", old.preemption) != "swap":
        changes["swap_blocks"] = None
    if changes.get("model", old.model) != old.model:
        changes.setdefault("max_model_len", None)  # the new model's default
    if changes.get("enable_prefix_caching") is False or changes.get("memory") in AHEAD:
        changes |= {"eviction": None, "eviction_policy": None}
    if changes.get("memory", old.memory) != "vattention":
        changes |= {"mapping": None, "tensor_slicing": False}
    return replace(old, **changes)


def _sampling(payload: dict[str, Any]) -> dict[str, Any]:
    """The payload's optional sampling parameters. Raises `BadCommand` with the name of a field that is invalid."""
    given = {name: payload[name] for name in REFINED if payload.get(name) is not None}
    stop = given.get("stop")
    if stop is not None:
        if not isinstance(stop, list) or len(stop) > MAX_STOPS:
            raise BadCommand(f"stop must be a list of at most {MAX_STOPS} strings", "stop")
        given["stop"] = tuple(_text({"stop": text}, "stop", 200) for text in stop)
    for name, value in given.items():
        try:  # one at a time, to know which is invalid; beam_width forbids others, so params() checks it with them
            SamplingParams(max_tokens=None, **({name: value} if name != "beam_width" else {}))
        except InvalidRequest as error:
            raise BadCommand(str(error), name) from None
    return given


def _text(payload: dict[str, Any], name: str, limit: int) -> str:
    value = payload.get(name)
    if not isinstance(value, str):
        raise BadCommand(f"the {name} must be text", name)
    if len(value) > limit:
        raise BadCommand(f"The {name} has {len(value):,} characters; {limit:,} is the most this page takes.", name)
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadCommand(f"the {name} contains half a character (a lone surrogate); please retype it", name)
    return value


def _number(payload: dict[str, Any], name: str, label: str, low: float, high: float, whole: bool = False) -> float:
    value = payload.get(name)
    kind = "a whole number" if whole else "a number"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if low <= value <= high and (not whole or value == int(value)):
            return value
    raise BadCommand(f"{label} must be {kind} between {low:g} and {high:g}.", name)


def _rate(value: Any) -> float | None:
    """Steps per second, or ``None`` (as fast as possible) for ``"max"``."""
    return None if value == "max" else _number({"rate": value}, "rate", "Speed", 0.2, MAX_RATE)


def _sentence(message: str) -> str:
    message = message[:1].upper() + message[1:]
    return message if message.endswith((".", "!", "?")) else message + "."
