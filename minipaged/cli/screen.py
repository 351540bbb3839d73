"""What the terminal shows of a model's text: control characters made visible, words wrapped at the window's width."""

from __future__ import annotations

import os
import sys
import unicodedata

TAB = 8
# A terminal executes control characters: a text may contain a sequence that changes the window's title, fills the
# clipboard or hides lines. Without the first character a sequence is only text, so no state is needed across chunks.
_VISIBLE: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20)}  # U+2400 …: pictures of controls
_VISIBLE |= {code: 0xFFFD for code in range(0x80, 0xA0)}  # the C1 controls, the 8-bit form of sequences
_VISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)  # reorder the text around them
_VISIBLE |= {0x7F: 0x2421, ord("\r"): None}  # a carriage return would let a text overwrite its own line
del _VISIBLE[ord("\n")], _VISIBLE[ord("\t")]


def shown(text: str) -> str:
    """The text with every control character but newlines and tabs replaced by a visible one."""
    return text.translate(_VISIBLE)


class Printer:
    """Prints streamed text. On a terminal it breaks lines between words, so the newest word waits for its end."""

    def __init__(self) -> None:
        self._wraps = sys.stdout.isatty()
        self._gap = self._word = ""  # not printed yet: spaces, and the word behind them
        self._column = 0

    def write(self, text: str) -> None:
        ready = "".join(map(self._add, shown(text))) if self._wraps else shown(text)
        print(ready, end="", flush=True)

    def end(self) -> None:
        """Prints the word that waits, and ends the line."""
        print(self._placed(), flush=True)
        self._column = 0

    def _add(self, char: str) -> str:
        """What can be printed once this character is known."""
        if char == "\n":
            ready, self._gap, self._column = self._placed() + char, "", 0
            return ready
        if char in " \t":
            ready = self._placed()
            self._gap += char
            return ready
        self._word += char
        return self._placed() if cells(char) == 2 else ""  # Chinese and Japanese text may be broken anywhere

    def _placed(self) -> str:
        """The gap and the word, or, if they do not fit into the line, a new line with the word."""
        if not self._word:
            return ""
        gap, word, self._gap, self._word = self._gap, self._word, "", ""
        window = _window()
        after = self._column
        for char in gap:
            after = (after // TAB + 1) * TAB if char == "\t" else after + 1
        size = sum(map(cells, word))
        if after + size > window and self._column > 0:
            gap, after = "\n", 0
        for_line, self._column = [gap], after
        for char in word:  # longer than a line: broken where the line is full
            if self._column + cells(char) > window:
                for_line.append("\n")
                self._column = 0
            for_line.append(char)
            self._column += cells(char)
        return "".join(for_line)


def cells(char: str) -> int:
    """The number of columns that a character takes: 2 if it is wide, 0 if it modifies the one before it."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _window() -> int:
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or 80
