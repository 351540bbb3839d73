"""Automatic prefix caching: full blocks found again by their content.

A block's KV depends on its own tokens *and* on all tokens before it. So a cached block is named by a pair (name of the
prefix before it, its tokens): a chain in which every link names everything up to it. Looking the pair up in a dict
compares both parts for equality, so two prefixes whose hashes collide are never taken for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import count
from typing import Protocol

from minipaged.events import Cached, EventLog, Evicted, Predicted
from minipaged.memory.eviction import LRU, LeafFirst

EMPTY_PREFIX = 0  # the name of "no tokens yet", parent of every first block


class EvictionPolicy(Protocol):
    """Decides which cached block nobody uses is given up first. `minipaged.memory.eviction` has some."""

    def add(self, block: int) -> None:
        """``block`` has lost its last owner; it may be evicted from now on."""

    def remove(self, block: int) -> None:
        """``block`` was hit and has an owner again."""

    def evict(self) -> int:
        """Picks a block, forgets it and returns it. Called only when there is one."""


class PrefixCache:
    """An index from content to blocks. Who owns the blocks is `BlockPool`'s business."""

    def __init__(self, events: EventLog, policy: EvictionPolicy | None = None) -> None:
        self._events = events
        self._policy = LRU() if policy is None else policy
        self._tree = self._policy if isinstance(self._policy, LeafFirst) else None
        if self._tree is not None:
            self._tree.bind(self)
        self._names = count(EMPTY_PREFIX + 1)  # never reused: a stale parent can match nothing
        self._index: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (parent, tokens) -> (name, block)
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> its key in the index
        self._name_of: dict[int, int] = {}
        self._block_of: dict[int, int] = {}  # name -> block
        self._branches: dict[int, int] = {}  # name -> how many evictable blocks continue that prefix
        self.evictable: set[int] = set()  # cached blocks that no table names
        self.bits: dict[int, bool] = {}  # cached block -> what was predicted of it last

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
        self._name_of[block], self._block_of[name] = name, block
        self._events.emit(Cached, block, name, parent)
        return name

    def name(self, block: int) -> int:
        """What the prefix is called that ends with this cached block. Later ones have larger numbers."""
        return self._name_of[block]

    def is_leaf(self, block: int) -> bool:
        """Whether no evictable block continues this cached one."""
        return self._name_of[block] not in self._branches

    def path(self, block: int) -> list[tuple[int, ...]]:
        """The tokens of the blocks from the root to this cached one; nothing if one of those before it is gone."""
        path = []
        parent = self.name(block)
        while parent in self._block_of:
            parent, tokens = self._key_of[self._block_of[parent]]
            path.append(tokens)
        return path[::-1] if parent == EMPTY_PREFIX else []

    @property
    def predicts(self) -> bool:
        """Whether the policy wants to `predict`."""
        return self._tree is not None and self._tree.predict is not None

    def predict(self, tokens: Seq[int]) -> bool:
        """Asks the policy's predictor about a prompt: 1 if its blocks will not be needed again in time."""
        assert self._tree is not None and self._tree.predict is not None
        return bool(self._tree.predict(tokens))

    def note(self, blocks: Iterable[int], bit: bool) -> None:
        """This was predicted of the request that used these blocks; those that are cached keep it in mind."""
        cached = [block for block in blocks if block in self]
        self.bits.update(dict.fromkeys(cached, bit))
        self._events.emit(Predicted, cached, bit)

    def retire(self, block: int) -> None:
        """The last owner is gone: the block stays findable until `evict` picks it."""
        self.evictable.add(block)
        parent = self._key_of[block][0]
        self._branches[parent] = self._branches.get(parent, 0) + 1
        self._policy.add(block)

    def revive(self, block: int) -> None:
        """A retired block was hit."""
        self.evictable.remove(block)
        self._prune(self._key_of[block][0])
        self._policy.remove(block)

    def evict(self) -> int:
        """Gives up one retired block; its content can no longer be found."""
        block = self._policy.evict()
        self.evictable.remove(block)
        key = self._key_of.pop(block)
        self._prune(key[0])
        del self._index[key], self._block_of[self._name_of.pop(block)]
        self.bits.pop(block, None)
        self._events.emit(Evicted, block, self._tree.reason if self._tree is not None else "")
        return block

    def _prune(self, parent: int) -> None:
        """One evictable block less continues that prefix."""
        self._branches[parent] -= 1
        if not self._branches[parent]:
            del self._branches[parent]
