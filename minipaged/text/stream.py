"""Incremental detokenization: converts tokens to text, one token at a time.

Decoding each token on its own is wrong in three ways: a character may be split over tokens (``"é"`` is
two bytes), SentencePiece drops the space before the first word that it decodes, and a stop string may
begin in one token and end in another. `TextStream` handles all three, at the same cost for every token.
Special tokens are not in the text, but a stop string may name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any

REPLACEMENT = "\ufffd"  # decoders show it for bytes that are not a (complete) character

# An unfinished character is at most 3 bytes long. Byte-level decoders show it as one U+FFFD, decoders with
# byte fallback as one per byte; either way at most three of them can still become part of a character.
MAX_UNFINISHED = 3

# Tokens decoded again at each push. A character is at most 4 tokens long, so this leaves enough context.
MAX_WINDOW = 16


class TextStream:
    """Incremental detokenizer of one sequence, with stop strings.

    The pieces returned by `push` and `finish`, joined, equal the tokenizer's own decoding of all tokens without
    the special ones, cut before the stop string that is completed first (if one character completes two of them,
    before the longer one). One exception: with byte fallback, characters that were returned stay, where the decoder
    gives up a whole run of bytes because of one that is no text. A stop string matches the text; one that contains the
    name of a special token, such as ``"<|im_end|>"``, also matches where the model generates that token.

    Each push decodes a short window of tokens again and compares the text with the previous one. The window starts
    at a *clean point*, a token boundary where no character is unfinished, and contains some tokens of context so
    that the tokenizer treats the newest token as the middle of a text (for the first token, the end of the prompt).

    Args:
        tokenizer: a Hugging Face tokenizer, byte-level or SentencePiece-like.
        prompt_token_ids: used only as context; their text is not returned.
        stop: strings that end the sequence.

    Attributes:
        stopped: the stop string that ended the text, or ``None``.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: list[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special_token_ids(tokenizer)
        self._stop = tuple(stop)
        self._marks, self._marked = _marks(tokenizer, self._special, self._stop) if stop else ({}, {})
        self._tail = ""  # the end of the text processed so far, with marks
        self.stopped: str | None = None
        self._finished = False
        self._pieces: list[str] = []  # returned so far
        self._held = ""  # decoded, but may be the start of a stop string
        self._window = context_of(tokenizer, prompt_token_ids)
        self._shown = self._decode()  # the part of the window's text that has been processed
        self._clean = len(self._window)  # all bytes of window[:clean] have been processed

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that is now final, often none.

        Raises:
            RuntimeError: after a stop string ended the text or `finish` was called.
        """
        if self.stopped is not None or self._finished:
            raise RuntimeError("this text has ended; no token can follow")
        if token_id in self._special:
            mark = self._marks.get(token_id)
            if mark is None:
                return ""
            tail = self._decode()[len(self._shown) :]  # an unfinished character, which is final if the text ends here
            ends = (self._tail + tail + mark).endswith(tuple(self._marked))
            return self._emit(tail if ends else "", mark)
        self._window.append(token_id)
        text = self._decode()
        if not text.startswith(self._shown):
            # With byte fallback, an unfinished character changes the decoding of the whole run of bytes around it,
            # including characters that were already returned. Restart the window after those.
            del self._window[: self._clean]
            self._clean, self._shown, text = 0, "", self._decode()
        new = text[len(self._shown) :]
        unfinished = min(len(new) - len(new.rstrip(REPLACEMENT)), MAX_UNFINISHED)
        ready = new[: len(new) - unfinished]
        self._shown += ready
        self._slide(unfinished)
        return self._emit(ready)

    def finish(self) -> str:
        """Returns the text that was held back: an unfinished character as U+FFFD, an incomplete stop string.

        Call it when the sequence ends. A second call, or one after a stop string ended the text, returns ``""``.
        """
        if self._finished or self.stopped is not None:
            return ""
        self._finished = True
        return self._emit(self._decode()[len(self._shown) :])

    @property
    def text(self) -> str:
        """Everything returned so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def piece(self, token_id: int) -> str:
        """The text of any single token, decoded on its own; does not change the stream."""
        return self._tokenizer.decode([token_id])

    def fork(self) -> TextStream:
        """An independent copy, for a forked sequence."""
        other = copy(self)
        other._pieces, other._window = list(self._pieces), list(self._window)
        return other

    def _decode(self) -> str:
        return decode(self._tokenizer, self._window)

    def _slide(self, unfinished: int) -> None:
        """Keeps the window short. Its last ``unfinished`` characters have not been returned yet."""
        full = len(self._window) >= MAX_WINDOW
        if full and unfinished == 0:
            del self._window[: self._clean]  # the newest token stays, as context
            self._shown = self._decode()
        elif full:
            # No clean point in the whole window: tokens that end inside characters, or bytes that are not text.
            # Cut between two characters if possible; otherwise the start is garbled, but it was returned before.
            text = self._decode()
            cuts = (cut for cut in (1, 2, 3, 4) if text.endswith(decode(self._tokenizer, self._window[cut:])))
            del self._window[: next(cuts, 4)]
            text = self._decode()
            self._shown, self._clean = text[: len(text) - unfinished], 0
        if unfinished == 0:
            self._clean = len(self._window)

    def _emit(self, ready: str, mark: str = "") -> str:
        """Adds decoded text and a mark, looks for stop strings, and returns the text that is now final."""
        text = self._held + ready
        hits = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if self._marked:
            self._tail += ready + mark
            for marked, stop in self._marked.items():
                if (at := self._tail.find(marked)) >= 0:
                    start, end = (len(text) - self._length(self._tail[i:]) for i in (at, at + len(marked)))
                    hits.append((end, start, stop))
        if hits:
            _, start, self.stopped = min(hits)
            text, self._held = text[:start], ""
        else:
            keep = 0 if self._finished else len(_overlap(text, self._stop))
            if self._marked:
                self._tail = _overlap(self._tail, tuple(self._marked))
                keep = 0 if self._finished else max(keep, self._length(self._tail))
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            self._pieces.append(text)
        return text

    def _length(self, marked: str) -> int:
        """The length of a text without its marks."""
        return len(marked) - sum(map(marked.count, self._marks.values()))


def _overlap(text: str, stops: Sequence[str]) -> str:
    """The longest suffix of ``text`` that is a proper prefix of one of the stop strings."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[start:]
    return ""


def _marks(tokenizer: Any, special: frozenset[int], stops: Sequence[str]) -> tuple[dict[int, str], dict[str, str]]:
    """Marks of the special tokens that stop strings name, and these stop strings with marks → as they were given.

    A mark is half of a surrogate pair, a character that no text contains.
    """
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in special}
    longest = sorted((name for name in names.values() if name), key=len, reverse=True)
    named = [name for name in dict.fromkeys(longest) if any(name in stop for stop in stops)]
    mark_of = {name: chr(0xD800 + number) for number, name in enumerate(named)}
    marked = {}
    for stop in stops:
        replaced = stop
        for name, mark in mark_of.items():
            replaced = replaced.replace(name, mark)
        if replaced != stop:
            marked[replaced] = stop
    return {token: mark_of[name] for token, name in names.items() if name in mark_of}, marked


def context_of(tokenizer: Any, prompt_token_ids: list[int]) -> list[int]:
    """The shortest suffix of a prompt that decodes to valid text (it must not start inside a character), if any."""
    special = special_token_ids(tokenizer)
    tail = [token for token in prompt_token_ids[-MAX_WINDOW:] if token not in special]
    for start in range(len(tail) - 1, -1, -1):
        text = decode(tokenizer, tail[start:])
        if text and REPLACEMENT not in text:
            return tail[start:]
    return []


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    """The tokenizer's text for these tokens, without special tokens and without clean-up of spaces."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=8)
def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, which are not text: end of text, turn markers, padding."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))
