"""Spells single tokens: the text, or the part of a character, that each adds to the text around it.

A log-probability belongs to a token, and clients put tokens together again. The text of a token decoded on its own does
not add up: SentencePiece drops the space before it, WordPiece shows its "##", and a token with half of an emoji is
U+FFFD. `Spelling` spells a token in the middle of a text, in bytes; `Reader` follows a text token by token.
"""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import Any, NamedTuple

from minipaged.text.stream import REPLACEMENT, decode, special_token_ids

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a single byte, in a vocabulary with byte fallback


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _alphabet()


class Spelling:
    """The bytes and names of a tokenizer's tokens. ``tokenizer``: a Hugging Face tokenizer, or ``None``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special = special_token_ids(tokenizer) if tokenizer is not None else frozenset()
        self._before = self._ordinary() if tokenizer is not None else []
        self._known: dict[tuple[int, bool], bytes] = {}

    def bytes_of(self, token_id: int, first: bool = False) -> bytes:
        """What the token adds to a text, in UTF-8: part of a character if it has no more; nothing if it is special.

        ``first``: no text precedes it, which matters to tokenizers that put spaces between tokens.
        """
        if (token_id, first) not in self._known:
            self._known[token_id, first] = self._bytes_of(token_id, first)
        return self._known[token_id, first]

    def name(self, token_id: int, first: bool = False) -> str:
        """The token's text; ``bytes:\\xf0\\x9f`` for part of a character, as with OpenAI; a special token's name."""
        if self._tokenizer is None or self._piece(token_id) is None:
            return f"<{token_id}>"
        if token_id in self.special:
            return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        spelled = self.bytes_of(token_id, first)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def falls_back(self, token_id: int) -> bool:
        """Whether the token stands for one byte of a character that the vocabulary does not have."""
        return self._tokenizer is not None and bool(BYTE.fullmatch(self._piece(token_id) or ""))

    def _bytes_of(self, token_id: int, first: bool) -> bytes:
        piece = self._piece(token_id) if self._tokenizer is not None else None
        if piece is None or token_id in self.special:
            return b""
        text = self._text(token_id, first)
        if REPLACEMENT in text:
            if byte := BYTE.fullmatch(piece):
                return bytes.fromhex(byte[1])
            if all(char in ALPHABET for char in piece):
                return bytes(ALPHABET[char] for char in piece)
        return text.encode()

    def _text(self, token_id: int, first: bool) -> str:
        before = [] if first else self._before
        whole, start = decode(self._tokenizer, [*before, token_id]), decode(self._tokenizer, before)
        return whole[len(start) :] if whole.startswith(start) else decode(self._tokenizer, [token_id])

    def _piece(self, token_id: int) -> str | None:
        """The token in the vocabulary; ``None`` for an id beyond its end, which padded models have."""
        return self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None

    def _ordinary(self) -> list[int]:
        """A token that is a whole text by itself: what stands before a token in the middle of a text."""
        for token_id in range(len(self._tokenizer)):
            text = decode(self._tokenizer, [token_id])
            if text.isalpha() and text.isascii() and not BYTE.fullmatch(self._piece(token_id) or ""):
                return [token_id]
        return []


@lru_cache(maxsize=8)
def spelling_of(tokenizer: Any) -> Spelling:
    """The tokenizer's `Spelling`, made once."""
    return Spelling(tokenizer)


class Spelled(NamedTuple):
    """A token in a text: its number of characters from the start, and whether no text precedes it."""

    token_id: int
    offset: int
    first: bool


class Reader:
    """Reads a text's tokens in order. ``offset``: characters before the first one. ``first``: no text precedes it."""

    def __init__(self, spelling: Spelling, offset: int = 0, first: bool = False) -> None:
        self.spelling, self.offset, self._first = spelling, offset, first
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = b""  # byte fallback: the bytes of an unfinished character, or a run that is no text

    def read(self, token_ids: list[int]) -> list[Spelled]:
        """The next tokens. One that begins inside a character has that character's offset."""
        spelled = []
        for token_id in token_ids:
            added = self.spelling.bytes_of(token_id, self._first)
            if self.spelling.falls_back(token_id):
                begins = self._fall_back(added)
            else:
                if self._run and token_id not in self.spelling.special:
                    self.offset += 0 if _is_broken(self._run) else len(self._run)
                    self._run = b""
                begins = self.offset
                self.offset += len(self._characters.decode(added))
            spelled.append(Spelled(token_id, begins, self._first))
            self._first = self._first and token_id in self.spelling.special
        return spelled

    def _fall_back(self, byte: bytes) -> int:
        """Takes a token that is one byte and returns its offset. If a run is no text, each byte becomes one U+FFFD."""
        was_broken, self._run = _is_broken(self._run), self._run + byte
        if _is_broken(self._run):
            self.offset += 1 if was_broken else len(self._run)
            return self.offset - 1
        begins = self.offset
        if _is_whole(self._run):
            self.offset, self._run = self.offset + 1, b""
        return begins


def _is_whole(run: bytes) -> bool:
    try:
        return bool(run.decode())
    except UnicodeDecodeError:
        return False


def _is_broken(run: bytes) -> bool:
    """Whether no bytes that follow can make it text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(run)
    except UnicodeDecodeError:
        return True
    return False
