"""A conversation in the terminal: what was said so far, and the commands that change it."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minipaged.cli.chat_models import Answerer, ContextFull, Messages, Question
from minipaged.cli.keyboard import interruptible
from minipaged.cli.options import fail
from minipaged.cli.screen import Printer, shown
from minipaged.config import SamplingParams
from minipaged.errors import MinipagedError
from minipaged.models.sampling_defaults import FIELDS

HELP = """\
/system TEXT      set the system prompt ("" for none); without TEXT, show it
/retry            answer the last message again
/undo             take the last message and its answer back
/more             go on with an answer that was cut or stopped
/set NAME VALUE   set temperature, top_p, max_tokens, …; VALUE "default" resets it; without NAME, show all
/no-think         tell the model not to think before it answers (Qwen3); /think to think
/save FILE        write the conversation as JSON
/load FILE        continue a saved conversation
/reset, /clear    forget the conversation
/exit, /quit      leave (or Ctrl-C or Ctrl-D at the prompt; during an answer, Ctrl-C stops the answer only)
/help             this list
A line that ends with \\ continues on the next; \"\"\" begins and ends a message of several lines; pasted lines are one
message. Other lines that begin with a slash, such as a path, are messages, too."""

ALIASES = {"/clear": "/reset", "/quit": "/exit"}
SETTABLE = (*FIELDS, "presence_penalty", "frequency_penalty", "max_tokens", "seed")


class Chat:
    """The conversation so far, and the commands that change it."""

    def __init__(self, model: Answerer, system: str | None, sampling: dict[str, Any], template: dict[str, Any]) -> None:
        self._model, self._system = model, system
        self._sampling, self._template = sampling, template
        self._messages: Messages = []  # without the system prompt
        self._start = 0  # the first message that the model still sees: a full context drops the oldest turns
        self._cut = False  # whether the last answer can be continued
        self._attempts = 0
        self._commands: dict[str, tuple[Callable[[str], None], bool]] = {  # and whether it takes a text
            "/system": (self._set_system, True), "/retry": (self._retry, False), "/undo": (self._undo, False),
            "/more": (self._more, False), "/set": (self._set, True), "/save": (self._save, True),
            "/load": (self._load, True), "/reset": (self._reset, False), "/help": (lambda _: print(HELP), False),
            "/no-think": (lambda _: self._think(False), False), "/think": (lambda _: self._think(True), False),
            "/exit": (lambda _: None, False),
        }  # fmt: skip

    def run(self, entered: Iterable[str]) -> None:
        """Obeys and answers what is entered, until its end or /exit."""
        print(shown(self._model.describe(self._sampling)))
        print("Type a message; /help lists the commands.")
        for text in entered:
            name, _, rest = text.partition(" ")
            name = ALIASES.get(name, name)
            if "\n" in text or not text.startswith("/"):
                self._say(text.strip("\n") if "\n" in text else text.strip())
            elif name in self._commands:
                if self._obey(name, rest.strip()):
                    return
            elif hint := self._hint(name, rest):
                print(shown(hint))
            else:
                self._say(text)

    # --- commands -----------------------------------------------------------------------------------------------

    def _obey(self, name: str, rest: str) -> bool:
        """Runs a command. Returns whether the chat ends."""
        command, takes_text = self._commands[name]
        if rest and not takes_text:
            print(shown(f"{name} stands alone; to send this as a message, begin with a space."))
            return False
        try:
            command(rest)
        except (OSError, ValueError, RecursionError) as error:
            fail(str(error))
        return name == "/exit"

    def _hint(self, name: str, rest: str) -> str:
        """What to tell about a slash that is no command: nothing about a path, which is a message."""
        if os.path.lexists(name):
            return ""
        if close := difflib.get_close_matches(name.lower(), self._commands, 1, 0.75):
            return f"There is no {name}; did you mean {close[0]}? To send it as a message, begin with a space."
        if not rest and re.fullmatch(r"/[A-Za-z-]*", name):
            return f"There is no {name}; /help lists the commands. To send it as a message, begin with a space."
        return ""

    def _set_system(self, text: str) -> None:
        if text:
            self._system = None if text in ('""', "''") else text
        print(f"System prompt: {shown(self._system or 'none')}")

    def _retry(self, _: str) -> None:
        if not any(message["role"] == "user" for message in self._messages):
            raise ValueError("there is no answer yet, so /retry has nothing to answer again")
        before, cut = self._messages, self._cut
        self._messages = before[:-1] if before[-1]["role"] == "assistant" else list(before)
        self._attempts += 1
        if not self._ask():
            self._messages, self._cut = before, cut

    def _undo(self, _: str) -> None:
        if not self._messages:
            raise ValueError("there is no message yet, so /undo has nothing to take back")
        while self._messages and self._messages.pop()["role"] != "user":
            pass
        self._start, self._cut = 0, False
        print(f"Took the last message and its answer back; {self._length()}.")

    def _more(self, _: str) -> None:
        if not self._cut:
            raise ValueError("there is no answer that was cut or stopped, so /more has nothing to go on with")
        begun = self._messages[-1]["content"].rstrip("\ufffd")  # the first bytes of a character; they come again
        self._messages[-1] = {"role": "assistant", "content": begun}
        self._ask(continues=True)

    def _set(self, text: str) -> None:
        name, value = [*text.replace("=", " ", 1).split(None, 1), "", ""][:2]
        if value == "default" and name in SETTABLE:
            self._sampling.pop(name, None)
        elif value:
            if name not in SETTABLE:
                raise ValueError(f"/set knows {', '.join(SETTABLE)}, not {name!r}")
            setting: dict[str, Any] = {name: _number(value)}
            SamplingParams(**({"max_tokens": None} | setting))
            self._sampling |= setting
        elif name:
            raise ValueError(f"/set {name} needs a value, for example /set temperature 0.2")
        print(shown(self._model.describe(self._sampling)))
        others = [f"{name} {self._sampling[name]}" for name in SETTABLE[len(FIELDS) :] if name in self._sampling]
        if others:
            print(", ".join(others))

    def _think(self, thinks: bool) -> None:
        template = self._template | {"enable_thinking": thinks}
        self._model.check(template)
        self._template = template
        print("The model is told to think before it answers." if thinks else "The model is told not to think.")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        text = json.dumps({"messages": self._all()}, indent=1, ensure_ascii=False) + "\n"
        Path(os.path.expanduser(name)).write_bytes(text.encode())  # encoded first: an error leaves the file as it was
        print(f"Saved {_count(len(self._messages), 'message')}.")

    def _load(self, name: str) -> None:
        if not name:
            raise ValueError("/load needs the name of a file")
        saved = json.loads(Path(os.path.expanduser(name)).read_text("utf-8-sig"))
        messages = saved.get("messages") if isinstance(saved, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f"{name} is not a saved conversation")
        self._system = next((m["content"] for m in messages if m["role"] == "system"), None)
        self._messages = [message for message in messages if message["role"] != "system"]
        self._start, self._cut = 0, bool(self._messages) and self._messages[-1]["role"] == "assistant"
        print(f"Loaded {_count(len(self._messages), 'message')}.")

    def _reset(self, _: str) -> None:
        self._messages, self._start, self._cut = [], 0, False
        print("The conversation is empty again.")

    def _length(self) -> str:
        return f"{_count(len(self._messages), 'message')} left" if self._messages else "the conversation is empty"

    # --- answers ------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        if not self._ask():
            self._messages.pop()

    def _ask(self, continues: bool = False) -> bool:
        """Streams the model's answer to the last message, and keeps it, also if it was stopped.

        Drops the oldest turns that leave no room for it. Returns False after an error, which changes nothing.
        """
        before = self._start
        try:
            while True:
                try:
                    self._stream(self._question(continues))
                    break
                except ContextFull:
                    if self._next_turn() is None:
                        raise
                    self._start = self._next_turn() or 0
        except MinipagedError as error:
            self._start = before
            if self._template and "chat_template_kwargs" in str(error):
                # A server's template does not know what /think or /no-think set.
                fail(f"{error}; asked again without it")
                self._template = {}
                return self._ask(continues)
            full = isinstance(error, ContextFull) or "needs room" in str(error)
            fail(f"{error} (/reset forgets the conversation)" if full else str(error))
            return False
        if self._start > before:
            print(_dim(self._dropped(before)))
        return True

    def _question(self, continues: bool) -> Question:
        sampling = dict(self._sampling)
        if "seed" in sampling:
            sampling["seed"] += self._attempts  # another answer, which repeats as well
        return Question(
            self._all(self._start), continues, sampling, self._template, can_shrink=self._next_turn() is not None
        )

    def _stream(self, question: Question) -> None:
        """Prints an answer while it is generated, until its end or Ctrl-C, and adds it to the conversation."""
        printer, texts, began = Printer(), list[str](), time.perf_counter()
        reason: str | None = None
        pieces = self._model.answer(question)
        with interruptible(self._model.stops_at_once) as stopped:
            try:
                for text, ended in pieces:
                    reason = ended
                    printer.write(text)
                    texts.append(text)
                    if stopped:
                        break
            except KeyboardInterrupt:
                if len(stopped) > 1:
                    raise
            except MinipagedError:
                if texts:
                    printer.end()  # the message gets a line of its own
                raise
            finally:
                getattr(pieces, "close", lambda: None)()  # ends the request, in the engine or at the server
        printer.end()
        self._cut = reason == "length" or (bool(stopped) and reason is None)
        self._messages[self._start :] = [m for m in question.answered("".join(texts)) if m["role"] != "system"]
        self._report(reason, bool(stopped), time.perf_counter() - began)

    def _report(self, reason: str | None, stopped: bool, seconds: float) -> None:
        """Says why the answer ended if it is not complete, and on a terminal how many tokens it took."""
        usage, context = self._model.usage, self._model.context
        if reason == "length":
            print(_dim(f"[cut: {self._limit()}]"))
        if not sys.stdout.isatty():
            return
        parts = ["stopped; /more goes on"] if stopped and reason is None else []
        parts.append(f"{_count(usage.output, 'token')}, {usage.output / max(seconds, 1e-9):.1f} tokens/s")
        if usage.prompt is not None:
            of = f" of {context:,}" if context else ""
            cached = f", {usage.cached:,} from the prefix cache" if usage.cached is not None else ""
            parts.append(f"context: {usage.prompt + usage.output:,}{of} tokens{cached}")
        print(_dim(f"[{'; '.join(parts)}]"))

    def _limit(self) -> str:
        """Why the answer was cut, and how it goes on."""
        limit, context = self._sampling.get("max_tokens"), self._model.context
        if limit and self._model.usage.output >= limit:
            return f"max_tokens is {limit:,}; /more goes on"
        if context is None or (self._model.usage.prompt or 0) + self._model.usage.output < context:
            return "no room was left for more; /more goes on"
        if self._next_turn() is None:
            return f"this turn alone fills the context of {context:,} tokens; /reset begins anew"
        return f"the context of {context:,} tokens is full; /more drops the oldest turns and goes on"

    def _all(self, start: int = 0) -> Messages:
        """The system prompt and the messages, from the one at ``start`` on."""
        return ([{"role": "system", "content": self._system}] if self._system else []) + self._messages[start:]

    def _next_turn(self) -> int | None:
        """Where the second turn that the model sees begins; ``None`` if there is only one."""
        turns = (i for i in range(self._start + 1, len(self._messages)) if self._messages[i]["role"] == "user")
        return next(turns, None)

    def _dropped(self, before: int) -> str:
        """Says which messages the model does not see any longer."""
        users = [m["content"] for m in self._messages[before : self._start] if m["role"] == "user"]
        quoted = ", ".join(f"“{_short(text)}”" for text in users)
        return f"[the context is full: the model no longer sees {_count(len(users), 'turn')}: {shown(quoted)}]"


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
        and not re.search("[\ud800-\udfff]", message["content"])  # half of a surrogate pair, which no model can read
    )


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"/set needs a number, not {text!r}") from None


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(text: str, most: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text
