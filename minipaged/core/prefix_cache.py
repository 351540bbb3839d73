"""Automatic prefix caching: full blocks found again by their content.

The KV of a block depends on its own tokens *and* on all tokens before it. So the index has a block under the key (name
of the prefix before it, its tokens), and gives it a name, a number: a name stands for all tokens up to the block's end.
The index compares both parts of a key for equality, so two prefixes whose hashes collide are never confused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Protocol

from minipaged.events import Cached, EventLog, Evicted  # see events/

EMPTY_PREFIX = 0  # the name of "no tokens yet", parent of every first block


class Hit(NamedTuple):
    """A block in the index: the name of the prefix that ends with it, and the block."""

    prefix: int
    block: int


class EvictionPolicy(Protocol):
    """Decides which cached block is evicted first. `features.eviction` has others than `LRU`.

    Optional: ``bind(cache)``, called once with the `PrefixCache`; ``reason``, why the last block was evicted.
    """

    def add(self, block: int) -> None:
        """``block`` has lost its last owner and may be evicted from now on."""

    def remove(self, block: int) -> None:
        """``block`` was hit and has an owner again."""

    def evict(self) -> int:
        """Picks a block, forgets it and returns it. Called only when there is one."""


class LRU:
    """Evicts the least recently used *leaf*: a block that no other evictable block continues.

    The blocks before a block should outlive it. Tables free their last block first: the oldest is nearly always a leaf.
    """

    def __init__(self) -> None:
        self.reason = "unused for longest"
        self._blocks: OrderedDict[int, None] = OrderedDict()  # without owner, in the order in which they lost it

    def bind(self, cache: PrefixCache) -> None:
        """Takes the cache whose blocks these are."""
        self._cache = cache

    def add(self, block: int) -> None:
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def evict(self) -> int:
        block = next(self.leaves())
        self.remove(block)
        return block

    def leaves(self) -> Iterator[int]:
        """The leaves, least recently used first."""
        return (block for block in self._blocks if self._cache.is_leaf(block))


class PrefixCache:
    """The index from content to blocks. `BlockPool` counts their owners."""

    def __init__(self, events: EventLog, policy: EvictionPolicy | None = None) -> None:
        self._events = events
        self.policy: EvictionPolicy = LRU() if policy is None else policy
        getattr(self.policy, "bind", lambda cache: None)(self)
        self._names = count(EMPTY_PREFIX + 1)  # never reused: what continued an evicted block is never hit again
        self._index: dict[tuple[int, tuple[int, ...]], Hit] = {}  # (parent, tokens) → hit
        self.key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block → its key in the index
        self.block_of: dict[int, int] = {}  # name → block, for features.eviction
        self._branches: dict[int, int] = {}  # name → how many evictable blocks continue that prefix
        self.evictable: set[int] = set()  # blocks in the index without owner: the pool's *cached* ones

    def __contains__(self, block: int) -> bool:
        return block in self.key_of

    def lookup(self, parent: int, tokens: tuple[int, ...]) -> Hit | None:
        """The block that continues the prefix ``parent`` by one full block of ``tokens``, if it is in the index."""
        return self._index.get((parent, tokens))

    def insert(self, parent: int, tokens: tuple[int, ...], block: int) -> int:
        """Adds a block with computed KV to the index; returns the name of the prefix that ends with it.

        If another block with the same content is in the index, returns that one's name: ``block`` stays a private copy.
        """
        key = (parent, tokens)
        if key in self._index:
            return self._index[key].prefix
        name = next(self._names)
        self._index[key] = Hit(name, block)
        self.key_of[block] = key
        self.block_of[name] = block
        self._events.emit(Cached, block, name, parent)  # it can be found now; its owner still uses it
        return name

    def name(self, block: int) -> int:
        """The name of the prefix that ends with this block of the index. Later names are larger numbers."""
        return self._index[self.key_of[block]].prefix

    def is_leaf(self, block: int) -> bool:
        """Whether no evictable block continues this one."""
        return self.name(block) not in self._branches

    def retire(self, block: int) -> None:
        """The last owner is gone: the block stays findable until it is evicted."""
        self.evictable.add(block)
        parent = self.key_of[block][0]
        self._branches[parent] = self._branches.get(parent, 0) + 1
        self.policy.add(block)

    def revive(self, block: int) -> None:
        """A retired block was hit and has an owner again."""
        self.evictable.remove(block)
        self._prune(self.key_of[block][0])
        self.policy.remove(block)

    def evict(self) -> int:
        """Drops one retired block from the index and returns it."""
        block = self.policy.evict()
        self.evictable.remove(block)
        key = self.key_of.pop(block)
        self._prune(key[0])
        del self.block_of[self._index.pop(key).prefix]
        self._events.emit(Evicted, block, getattr(self.policy, "reason", ""))
        return block

    def _prune(self, parent: int) -> None:
        """One evictable block less continues that prefix."""
        self._branches[parent] -= 1
        if not self._branches[parent]:
            del self._branches[parent]
