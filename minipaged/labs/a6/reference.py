"""Lab A6: blocks found again by their content.

You write the methods that raise NotImplementedError. README.md, beside this file, says what they must do.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(eq=False)
class Entry:
    """A cached block: its own tokens, and the entry of the block before it (None for the first of a text)."""

    block: int
    tokens: tuple[int, ...]
    parent: Entry | None
    hash: int


class PrefixCache:
    """Finds, for a text that begins like an earlier one, the blocks that hold keys and values of its beginning."""

    def __init__(self, block_size: int, hash_bits: int = 32) -> None:
        self.block_size = block_size
        self.hash_bits = hash_bits
        self.index: dict[int, list[Entry]] = {}  # hash → the entries that have it
        self.entries: dict[int, Entry] = {}  # block → its entry
        self.unused: dict[int, None] = {}  # cached blocks without owner; those that lost it first come first

    def hash_block(self, parent: Entry | None, tokens: tuple[int, ...]) -> int:
        """A number of hash_bits bits for tokens that follow on parent. With few bits, different ones may share one."""
        text = repr((parent.hash if parent else None, tokens))
        return zlib.crc32(text.encode()) >> (32 - self.hash_bits)

    # lab: A6.1, A6.2
    def find(self, parent: Entry | None, tokens: tuple[int, ...]) -> Entry | None:
        """The entry of exactly these tokens after exactly this parent, or None."""
        for entry in self.index.get(self.hash_block(parent, tokens), []):
            if entry.parent is parent and entry.tokens == tokens:
                return entry
        return None

    # lab: A6.1, A6.2
    def match(self, tokens: list[int]) -> list[int]:
        """The cached blocks with which this text begins, from its first on, as many as there are.

        Stops before the last token: at least one must be left to compute, else there are no logits.
        """
        blocks: list[int] = []
        parent = None
        for end in range(self.block_size, len(tokens), self.block_size):
            parent = self.find(parent, tuple(tokens[end - self.block_size : end]))
            if parent is None:
                break
            blocks.append(parent.block)
        return blocks

    # lab: A6.1, A6.2
    def insert(self, tokens: list[int], block: int) -> None:
        """``block`` holds the last block_size of these tokens, whose number is a multiple of block_size.

        The blocks of the tokens before them are cached. If another block is cached for the same text already, that one
        stays, and nothing changes.
        """
        parent, size = None, self.block_size
        for end in range(size, len(tokens), size):
            parent = self.find(parent, tuple(tokens[end - size : end]))
        own = tuple(tokens[-size:])
        if self.find(parent, own) is None:
            entry = Entry(block, own, parent, self.hash_block(parent, own))
            self.index.setdefault(entry.hash, []).append(entry)
            self.entries[block] = entry

    # lab: A6.3
    def retire(self, block: int) -> None:
        """A cached block has lost its last owner. It can still be found, and from now on evicted."""
        self.unused[block] = None

    # lab: A6.3
    def revive(self, block: int) -> None:
        """An unused block was found and has an owner again."""
        del self.unused[block]

    # lab: A6.3
    def evict(self, n: int) -> list[int]:
        """Gives up n unused blocks (all, if there are fewer), longest unused first. They can no longer be found."""
        blocks = list(self.unused)[:n]
        for block in blocks:
            del self.unused[block]
            entry = self.entries.pop(block)
            self.index[entry.hash].remove(entry)
        return blocks
