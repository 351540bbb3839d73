"""Eviction policies that choose by past use, by future use, or by predictions.

The literature's *page* is here a cached block that no block table contains. Blocks form trees, and a lookup begins at
the root, so a block is useless without the blocks before it. So all policies here evict *leaves first*: never a block
before the evictable blocks that continue it.

Three of the policies use one predicted bit per request (Antoniadis et al., Paging with Succinct Predictions, ICML 2023;
`prediction` has predictors). With k pages in the cache, their expected faults are at most α·OPT + β·η₀ + γ·η₁, where
OPT is the number of faults of `Belady`, and η₀, η₁ are the numbers of wrong 0s and wrong 1s. α, β, γ are:

    FlushWhenAll0       1, k − 1, 1
    Mark0               1, 2·H_k, 1      (H_k = 1 + 1/2 + … + 1/k)
    MarkAndPredict      2, H_k, 1

All but `LRU` look at every leaf for each eviction, which is slow with thousands of cached blocks.
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
    """Base class of the policies here: an `EvictionPolicy` that chooses among leaves.

    ``reason`` says why the last block was chosen. ``predict``, if set, is called once for each request, and ``bits``
    holds its answer for the blocks that the request used.
    """

    predict: Predictor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.bits: dict[int, bool] = {}  # cached block → the prediction for its latest request

    def evict(self) -> int:
        """Chooses a leaf, removes it from the policy and returns it."""
        block, self.reason = self.choose()
        self.remove(block)
        self.bits.pop(block, None)
        return block

    def note(self, blocks: Iterable[int], bit: bool) -> list[int]:
        """Stores the prediction for a request with those of its ``blocks`` that are cached, and returns them."""
        cached = [block for block in blocks if block in self._cache]
        self.bits.update(dict.fromkeys(cached, bit))
        return cached

    def discarded(self, blocks: Iterable[int]) -> list[int]:
        """The blocks with bit 1. A block has the bit of its latest request; without a prediction it counts as 0."""
        return [block for block in blocks if self.bits.get(block)]

    def choose(self) -> tuple[int, str]:
        """A leaf, and the reason for this choice."""
        raise NotImplementedError


class FIFO(LeafFirst):
    """First in, first out: evicts the block that was computed first, whether it was used since or not."""

    def choose(self) -> tuple[int, str]:
        return min(self.leaves(), key=self._cache.name), "in the cache for longest"


class Marker(LeafFirst):
    """Marks used blocks and evicts a random unmarked leaf; when there is none, a new phase begins without marks.

    The expected number of faults is at most 2·H_k·OPT (Fiat et al., 1991).
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
    """Evicts a leaf with *discard* bit 1 (Belady evicts it before its next request); without one, evicts all blocks.

    The cache is emptied only as blocks are needed: until then its blocks can still be hit, which never adds a fault.
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
        # A newer block may continue a flushed one: without a flushed leaf, it has to be evicted first.
        left = [block for block in self.leaves() if block in self._flushed] or list(self.leaves())
        return left[0], "all bits were 0, so the whole cache is given up"


class Mark0(Marker):
    """Evicts a random leaf with *discard* bit 1; if there is none, `Marker` chooses."""

    def __init__(self, predict: Predictor, seed: int = 0) -> None:
        super().__init__(seed)
        self.predict = predict

    def choose(self) -> tuple[int, str]:
        ones = self.discarded(self.leaves())
        if ones:
            return self._random.choice(ones), f"one of {len(ones)} with bit 1, at random"
        return super().choose()


class MarkAndPredict(Mark0):
    """Evicts a random unmarked leaf, if possible one with *phase* bit 1 (not needed in the next phase)."""

    def choose(self) -> tuple[int, str]:
        unmarked = self._unmarked()
        ones = self.discarded(unmarked)
        if ones:
            return self._random.choice(ones), f"one of {len(ones)} with bit 1 not used in this phase, at random"
        return self._random.choice(unmarked), f"no bit is 1; one of {len(unmarked)} not used in this phase, at random"


def path(cache: PrefixCache, block: int) -> list[tuple[int, ...]]:
    """The tokens of the blocks from the root to this cached one; empty if a block before it was evicted."""
    tokens_of = []
    parent = cache.name(block)
    while parent in cache.block_of:
        parent, tokens = cache.key_of[cache.block_of[parent]]
        tokens_of.append(tokens)
    return tokens_of[::-1] if parent == EMPTY_PREFIX else []


class Belady(LeafFirst):
    """Evicts the block whose next use is latest: the fewest possible faults, for pages without a tree.

    It must know ``requests``, all prompts in the order in which they will be admitted, and be told of each admission
    (`admitted`). So it cannot be chosen by name: pass ``eviction_policy=lambda: belady``.
    """

    def __init__(self, requests: Iterable[Seq[int]], block_size: int) -> None:
        super().__init__()
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}  # the tree of all prompts: (node, tokens) → node
        self._uses: list[list[int]] = [[]]  # node → the requests that look it up, in order
        for number, tokens in enumerate(requests):
            node = 0
            for end in range(block_size, len(tokens), block_size):  # as in `BlockTables.match`: without the last token
                key = node, tuple(tokens[end - block_size : end])
                node = self._nodes.setdefault(key, len(self._uses))
                if node == len(self._uses):
                    self._uses.append([])
                self._uses[node].append(number)
        self._node_of: dict[int, int | None] = {}
        self._seen: set[str] = set()

    def admitted(self, request_id: str) -> None:
        """Tells the policy that the next request runs. Repeating it for a preempted request changes nothing."""
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
        """The number of the first request not yet admitted that will look up the block; infinity if there is none."""
        node = self._node_of[block]
        uses = self._uses[node] if node else []
        index = bisect_left(uses, len(self._seen))
        return uses[index] if index < len(uses) else inf


Closing = Callable[[Seq[int]], bool]

# Policies that need no knowledge of the future, by their name in `EngineConfig.eviction`.
BY_NAME: dict[str, Callable[[int, Closing | None], LRU]] = {
    "lru": lambda seed, closing: LRU(),
    "fifo": lambda seed, closing: FIFO(),
    "marker": lambda seed, closing: Marker(seed),
    "flush-when-all-0": lambda seed, closing: FlushWhenAll0(LastTurn(closing)),
    "mark-0": lambda seed, closing: Mark0(LastTurn(closing), seed),
    "mark-and-predict": lambda seed, closing: MarkAndPredict(LastTurn(closing), seed),
}
