"""Automatic prefix caching: full blocks found again by their content.

A block's KV depends on its own tokens *and* on all tokens before it. So a cached block is named by a pair (name of the
prefix before it, its tokens): a chain in which every link names everything up to it. Looking the pair up in a dict
compares both parts for equality, so two prefixes whose hashes collide are never taken for each other.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count
from typing import Protocol

from minipaged.events import Cached, EventLog, Evicted

EMPTY_PREFIX = 0  # the name of "no tokens yet", parent of every first block


class EvictionPolicy(Protocol):
    """Decides which cached block nobody uses is given up first."""

    def add(self, block: int) -> None:
        """``block`` has lost its last owner; it may be evicted from now on."""

    def remove(self, block: int) -> None:
        """``block`` was hit and has an owner again."""

    def evict(self) -> int:
        """Picks a block, forgets it and returns it. Called only when there is one."""


class LRU:
    """Least recently used first. Tables free their tail before their head, so prefixes outlive their endings."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, block: int) -> None:
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def evict(self) -> int:
        return self._blocks.popitem(last=False)[0]


class PrefixCache:
    """An index from content to blocks. Who owns the blocks is `BlockPool`'s business."""

    def __init__(self, events: EventLog, policy: EvictionPolicy | None = None) -> None:
        self._events = events
        self._policy = LRU() if policy is None else policy
        self._names = count(EMPTY_PREFIX + 1)  # never reused: a stale parent can match nothing
        self._index: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (parent, tokens) -> (name, block)
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> its key in the index
        self.evictable: set[int] = set()  # cached blocks that no table names

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def lookup(self, parent: int, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """(name, block) of the prefix ``parent`` continued by one full block of ``tokens``, if it is cached."""
        return self._index.get((parent, tokens))

    def insert(self, parent: int, tokens: tuple[int, ...], block: int) -> int:
        """Makes a block findable whose KV has been computed, and returns the prefix's name.

        Where another block already holds the same content, that one stays in the index, and its name is returned:
        ``block`` remains a private copy of its owner.
        """
        key = (parent, tokens)
        if key in self._index:
            return self._index[key][0]
        name = next(self._names)
        self._index[key] = (name, block)
        self._key_of[block] = key
        self._events.emit(Cached, block, name, parent)
        return name

    def retire(self, block: int) -> None:
        """The last owner is gone: the block stays findable until `evict` picks it."""
        self.evictable.add(block)
        self._policy.add(block)

    def revive(self, block: int) -> None:
        """A retired block was hit."""
        self.evictable.remove(block)
        self._policy.remove(block)

    def evict(self) -> int:
        """Gives up one retired block; its content can no longer be found."""
        block = self._policy.evict()
        self.evictable.remove(block)
        del self._index[self._key_of.pop(block)]
        self._events.emit(Evicted, block)
        return block
