"""Lab A6: the prefix cache.

Its reference is a sibling of `core.prefix_cache.PrefixCache` that hashes: the engine's compares contents in a
dictionary, where no collision can be injected. The engine's cache passes the same checks.
"""

from __future__ import annotations

from typing import Any

from minipaged.core import prefix_cache
from minipaged.core.prefix_cache import EMPTY_PREFIX
from minipaged.events import EventLog
from minipaged.labs.lab import Lab, Mutant, Source, Task


def engine() -> dict[str, Any]:
    """The engine's cache, asked for whole texts. It compares contents: how many bits a hash has is all the same."""

    class Cache:
        def __init__(self, block_size: int, hash_bits: int = 32) -> None:
            self.size = block_size
            self.engine = prefix_cache.PrefixCache(EventLog())
            self.retire, self.revive = self.engine.retire, self.engine.revive

        def _found(self, tokens: list[int]) -> list[tuple[int, int]]:
            found: list[tuple[int, int]] = []
            for end in range(self.size, len(tokens), self.size):
                parent = found[-1][0] if found else EMPTY_PREFIX
                hit = self.engine.lookup(parent, tuple(tokens[end - self.size : end]))
                if hit is None:
                    break
                found.append(hit)
            return found

        def match(self, tokens: list[int]) -> list[int]:
            return [block for _, block in self._found(tokens)]

        def insert(self, tokens: list[int], block: int) -> None:
            before = self._found(tokens)
            self.engine.insert(before[-1][0] if before else EMPTY_PREFIX, tuple(tokens[-self.size :]), block)

        def evict(self, n: int) -> list[int]:
            return [self.engine.evict() for _ in range(min(n, len(self.engine.evictable)))]

    return {"PrefixCache": Cache}


MUTANTS = (
    Mutant(
        "a block that was hit counts as unused still, and is evicted while a sequence reads it",
        "A6.3",
        "        del self.unused[block]\n\n",
        "        pass\n\n",
    ),
    Mutant(
        "two contents with one hash are taken for each other",
        "A6.2",
        "if entry.parent is parent and entry.tokens == tokens:",
        "if entry.parent is parent:",
    ),
    Mutant(
        "the same tokens after another beginning are taken for a hit",
        "A6.2",
        "if entry.parent is parent and entry.tokens == tokens:",
        "if entry.tokens == tokens:",
    ),
    Mutant(
        "a prompt that is cached as a whole leaves nothing to compute, so there are no logits",
        "A6.1",
        "for end in range(self.block_size, len(tokens), self.block_size):",
        "for end in range(self.block_size, len(tokens) + 1, self.block_size):",
    ),
    Mutant(
        "an evicted block can still be found, though others write to it",
        "A6.3",
        "            self.index[entry.hash].remove(entry)\n",
        "",
    ),
    Mutant(
        "what was used last is evicted first",
        "A6.3",
        "list(self.unused)[:n]",
        "list(self.unused)[::-1][:n]",
    ),
)

LAB = Lab(
    key="A6",
    title="A prefix cache",
    minutes=90,
    file="prefix_cache.py",
    sources=(Source("minipaged.labs.a6.reference"),),
    tasks=(
        Task("A6.1", "Find what was computed", 3),
        Task("A6.2", "Trust no hash", 2, needs=("A6.1",)),
        Task("A6.3", "Give up what nobody uses", 3, needs=("A6.2",)),
        Task("A6.4", "Run in the engine", 2, needs=("A6.3",)),
    ),
    mutants=MUTANTS,
    engine=engine,
)
