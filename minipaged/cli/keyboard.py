"""What the user types in a chat: messages of one line or of several, pasted text, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A terminal sends these before and after pasted text, if it is asked to ("bracketed paste").
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"
ASK, ASK_NO_MORE = "\x1b[?2004h", "\x1b[?2004l"
# libedit, macOS's readline, does not know them, but can be told to replace them by other characters.
LIBEDIT = {PASTE_BEGINS: "\ue200", PASTE_ENDS: "\ue201"}


def messages() -> Iterator[str]:
    """Yields what the user enters, until the input ends. Raises KeyboardInterrupt at Ctrl-C.

    A message ends with its line, unless the line ends with a backslash or began with three quotation marks. Lines that
    are pasted at once are one message. Only a line that was typed can begin with a slash: of others, spaces at the
    beginning are kept.
    """
    if sys.stdin is None:  # closed
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8
    with _line_editor():
        while True:
            try:
                text = _message()
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print()
                raise
            if text.strip():
                yield text


def _message() -> str:
    line = _line("> ")
    if "\n" in line:  # pasted
        return line.strip("\n").rstrip()
    if line.lstrip().startswith('"""'):
        lines = [line.lstrip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(_line("... "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip()
    lines = [line.rstrip()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_line("... ").rstrip())
    return "\n".join(lines).rstrip()


def _line(prompt: str) -> str:
    """A line, or the lines that were pasted together."""
    text = _typed(prompt)
    if sys.stdin.isatty():
        while text.count(PASTE_BEGINS) > text.count(PASTE_ENDS):
            text += "\n" + _typed("")
        text = text.replace(PASTE_BEGINS, "").replace(PASTE_ENDS, "")
    return text


def _typed(prompt: str) -> str:
    text = input(prompt)
    for standard, own in LIBEDIT.items():
        text = text.replace(own, standard)
    return text


@contextmanager
def _line_editor() -> Iterator[None]:
    """On a terminal, pasted text arrives as one; with readline there are arrow keys and the history of all chats."""
    try:
        import readline  # Windows has none
    except ImportError:
        readline = None  # type: ignore[assignment]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
    elif readline is not None and "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")  # the default since readline 8.1
        with _history(readline):
            yield
    else:
        print(ASK, end="", flush=True)
        try:
            if readline is None:
                yield
            else:
                for standard, own in LIBEDIT.items():
                    readline.parse_and_bind(f'bind -s "\\e{standard[1:]}" "{own}"')
                readline.parse_and_bind('bind "\\t" ed-insert')
                with _history(readline):
                    yield
        finally:
            print(ASK_NO_MORE, end="", flush=True)


@contextmanager
def _history(readline: Any) -> Iterator[None]:
    """Loads the history of earlier conversations, and saves it at the end."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "minipaged" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError:  # continue without a history
        pass
    readline.set_history_length(1000)
    try:
        yield
    finally:
        try:
            readline.write_history_file(file)
        except OSError:
            pass


@contextmanager
def interruptible(at_once: bool) -> Iterator[list[int]]:
    """Collects Ctrl-C in a list. ``at_once``: the first one also raises KeyboardInterrupt; otherwise the second does.

    An exception in the middle of an engine's step would break its bookkeeping; waiting for a server may end anywhere.
    """
    stopped: list[int] = []

    def note(number: int, frame: Any) -> None:
        stopped.append(number)
        if at_once or len(stopped) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
