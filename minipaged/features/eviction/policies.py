"""Which cached block is evicted first: policies that go by the past, by the future, and by predictions.

A *page* of the literature is here a block in the prefix cache that no table names. Blocks form trees, and a lookup
begins at the root, so a block without those before it is of no use: all policies here evict *leaves first*, that is, no
block before those that continue it and could be evicted, too.

Three of the policies use one predicted bit per request (Antoniadis et al., Paging with Succinct Predictions, ICML 2023;
`prediction` has predictors). With k pages in the cache, their faults are at most α·OPT + β·η₀ + γ·η₁ in the mean, where
OPT are the faults of `Belady` and η₀, η₁ count the 0s and 1s that were wrong:

    FlushWhenAll0       1, k − 1, 1
    Mark0               1, 2·H_k, 1      (H_k = 1 + 1/2 + … + 1/k)
    MarkAndPredict      2, H_k, 1

All but `LRU` look at every leaf for each eviction: with thousands of cached blocks that takes a while.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from math import inf
from random import Random

from minipaged.core.prefix_cache import EMPTY_PREFIX, LRU, PrefixCache
from minipaged.features.eviction.prediction import LastTurn, Predictor


class LeafFirst(LRU):
    """What the policies here have in common: an `EvictionPolicy` that chooses among leaves.

    ``reason`` says in words why the last block was chosen. ``predict`` is asked once for each request, if there is one,
    and ``bits`` holds its answer for the blocks that the request used.
    """

    predict: Predictor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.bits: dict[int, bool] = {}  # cached block → the prediction for its latest request

    def evict(self) -> int:
        """Picks a leaf, forgets it and returns it."""
        block, self.reason = self.choose()
        self.remove(block)
        self.bits.pop(block, None)
        return block

    def note(self, blocks: Iterable[int], bit: bool) -> list[int]:
        """Keeps the prediction for a request with those of its ``blocks`` that are cached, and returns them."""
        cached = [block for block in blocks if block in self._cache]
        self.bits.update(dict.fromkeys(cached, bit))
        return cached

    def discarded(self, blocks: Iterable[int]) -> list[int]:
        """Those with bit 1. A block has the bit of its latest request, and without any prediction it is kept."""
        return [block for block in blocks if self.bits.get(block)]

    def choose(self) -> tuple[int, str]:
        """A leaf, and why this one."""
        raise NotImplementedError


class FIFO(LeafFirst):
    """First in, first out: whatever was computed first, used since or not."""

    def choose(self) -> tuple[int, str]:
        return min(self.leaves(), key=self._cache.name), "in the cache for longest"


class Marker(LeafFirst):
    """Whoever is used is marked. A random unmarked leaf goes; when there is none, a new phase begins without marks.

    Faults are at most 2·H_k·OPT in the mean (Fiat et al., 1991).
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = Random(seed)
        self._marked: set[int] = set()

    def add(self, block: int) -> None:
        super().add(block)
        self._marked.add(block)

    def choose(self) -> tuple[int, str]:
        unmarked = self._unmarked()
        return self._random.choice(unmarked), f"one of {len(unmarked)} not used in this phase, at random"

    def _unmarked(self) -> list[int]:
        """The unmarked leaves; those of a new phase if there are none."""
        unmarked = [block for block in self.leaves() if block not in self._marked]
        if not unmarked:
            self._marked.clear()
            unmarked = list(self.leaves())
        return unmarked


class FlushWhenAll0(LeafFirst):
    """A leaf with *discard* bit 1 (Belady would evict it before its next request); if there is none, all are evicted.

    The cache is emptied only as blocks are needed: until then what they held can still be found, which never costs a
    fault more.
    """

    def __init__(self, predict: Predictor) -> None:
        super().__init__()
        self.predict = predict
        self._flushed: set[int] = set()  # to be evicted before any other

    def remove(self, block: int) -> None:
        super().remove(block)
        self._flushed.discard(block)

    def choose(self) -> tuple[int, str]:
        if not self._flushed:
            ones = self.discarded(self.leaves())
            if ones:
                return ones[0], "its bit is 1: not expected to be used again in time"
            self._flushed = set(self._blocks)
        # What continues a flushed block and came later has a use for it; it can wait no longer either.
        left = [block for block in self.leaves() if block in self._flushed] or list(self.leaves())
        return left[0], "all bits were 0, so the whole cache is given up"


class Mark0(Marker):
    """A random leaf with *discard* bit 1; if there is none, `Marker`'s choice."""

    def __init__(self, predict: Predictor, seed: int = 0) -> None:
        super().__init__(seed)
        self.predict = predict

    def choose(self) -> tuple[int, str]:
        ones = self.discarded(self.leaves())
        if ones:
            return self._random.choice(ones), f"one of {len(ones)} with bit 1, at random"
        return super().choose()


class MarkAndPredict(Mark0):
    """Of the unmarked leaves a random one with *phase* bit 1 (not needed in the next phase), else a random one."""

    def choose(self) -> tuple[int, str]:
        unmarked = self._unmarked()
        ones = self.discarded(unmarked)
        if ones:
            return self._random.choice(ones), f"one of {len(ones)} with bit 1 not used in this phase, at random"
        return self._random.choice(unmarked), f"no bit is 1; one of {len(unmarked)} not used in this phase, at random"


def path(cache: PrefixCache, block: int) -> list[tuple[int, ...]]:
    """The tokens of the blocks from the root to this cached one; empty if one of those before it is gone."""
    tokens_of = []
    parent = cache.name(block)
    while parent in cache.block_of:
        parent, tokens = cache.key_of[cache.block_of[parent]]
        tokens_of.append(tokens)
    return tokens_of[::-1] if parent == EMPTY_PREFIX else []


class Belady(LeafFirst):
    """What is needed latest goes first: the fewest faults there can be, for pages without a tree.

    It has to know ``requests``, all prompts in the order in which they will be admitted, and be told of each admission
    (`admitted`). So it cannot be chosen by name: give ``eviction_policy=lambda: belady``.
    """

    def __init__(self, requests: Iterable[Seq[int]], block_size: int) -> None:
        super().__init__()
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}  # the tree of all prompts: (node, tokens) → node
        self._uses: list[list[int]] = [[]]  # node → the requests that look for it, in order
        for number, tokens in enumerate(requests):
            node = 0
            for end in range(block_size, len(tokens), block_size):  # as `BlockTables.match` does: not to the last token
                key = node, tuple(tokens[end - block_size : end])
                node = self._nodes.setdefault(key, len(self._uses))
                if node == len(self._uses):
                    self._uses.append([])
                self._uses[node].append(number)
        self._node_of: dict[int, int | None] = {}
        self._seen: set[str] = set()

    def admitted(self, request_id: str) -> None:
        """The next of the requests runs now. To be told again of one that was preempted changes nothing."""
        self._seen.add(request_id)

    def add(self, block: int) -> None:
        super().add(block)
        node: int | None = 0
        for tokens in path(self._cache, block):
            node = self._nodes.get((node, tokens)) if node is not None else None
        self._node_of[block] = node

    def choose(self) -> tuple[int, str]:
        block = max(self.leaves(), key=self.next_use)
        when = self.next_use(block)
        return block, "never used again" if when == inf else f"used again by request {when:g}, later than all others"

    def next_use(self, block: int) -> float:
        """The number of the first request, of those not yet admitted, that will look for the block; else infinite."""
        node = self._node_of[block]
        uses = self._uses[node] if node else []
        index = bisect_left(uses, len(self._seen))
        return uses[index] if index < len(uses) else inf


Closing = Callable[[Seq[int]], bool]

# Those that need no knowledge of the future, by the name that `EngineConfig.eviction` takes.
BY_NAME: dict[str, Callable[[int, Closing | None], LRU]] = {
    "lru": lambda seed, closing: LRU(),
    "fifo": lambda seed, closing: FIFO(),
    "marker": lambda seed, closing: Marker(seed),
    "flush-when-all-0": lambda seed, closing: FlushWhenAll0(LastTurn(closing)),
    "mark-0": lambda seed, closing: Mark0(LastTurn(closing), seed),
    "mark-and-predict": lambda seed, closing: MarkAndPredict(LastTurn(closing), seed),
}
