"""The student's prefix cache inside the real engine, watched at every call."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from minipaged.config import EngineConfig
from minipaged.core.block_table import BlockTables
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import EMPTY_PREFIX, Hit, PrefixCache
from minipaged.errors import InvalidConfig
from minipaged.events import EventLog
from minipaged.labs.student import StudentError, Violation

UNNAMED = -1  # a prefix that is not cached: its sequence keeps a copy of its own


class ShadowCache(PrefixCache):
    """The engine's cache, asking the student's at every call, and comparing."""

    def __init__(self, student: Any, block_size: int, hash_bits: int, events: EventLog) -> None:
        super().__init__(events)
        self.texts: dict[int, tuple[int, ...]] = {}  # cached block → all tokens up to its end
        self._theirs = student.new("PrefixCache", block_size, hash_bits)
        self._block_size = block_size

    def compare_match(self, tokens: Seq[int], wanted: list[int]) -> None:
        said = self._ask("match", list(tokens))
        call = f"match({list(tokens)})"
        if not isinstance(said, list) or not all(type(block) is int for block in said):
            raise Violation(f"{call} returned {said!r} instead of a list of blocks", "match: type")
        for logical, block in enumerate(said):
            self._judge(call, tuple(tokens[: (logical + 1) * self._block_size]), block, len(tokens))
        if said != wanted:
            raise Violation(f"{call} returned {said}, but blocks {wanted} are cached for it", "match: too short")

    def _judge(self, call: str, text: tuple[int, ...], block: int, length: int) -> None:
        """Whether a block was rightly found for ``text``, a beginning that ends with it."""
        size, held = self._block_size, self.texts.get(block)
        if held is None:
            raise Violation(f"{call} found block {block}, which is not in the cache", "match: not cached")
        if held != text:
            own, wanted = list(held[-size:]), list(text[-size:])
            if own == wanted and len(text) % size == 0:
                what = f"{own} after {list(held[:-size])}, not after {list(text[:-size])}"
            else:
                what = f"{own}, not {wanted}"
            raise Violation(f"{call} found block {block}, but that holds the tokens {what}", "match: other tokens")
        if len(text) >= length:
            raise Violation(f"{call} found all {length} tokens, but one must be left to compute", "match: all")

    def insert_text(self, tokens: Seq[int], block: int, table: Seq[int]) -> int:
        """The block holds the last of these tokens. Cached only where the sequence's blocks before it are, too."""
        size, parent = self._block_size, EMPTY_PREFIX
        for logical, end in enumerate(range(size, len(tokens), size)):
            found = self.lookup(parent, tuple(tokens[end - size : end]))
            if found is None or found[1] != table[logical]:
                return UNNAMED
            parent = found[0]
        self._ask("insert", list(tokens), block)
        name = self.insert(parent, tuple(tokens[-size:]), block)
        if block in self:
            self.texts[block] = tuple(tokens)
        return name

    def retire(self, block: int) -> None:
        super().retire(block)
        self._ask("retire", block)

    def revive(self, block: int) -> None:
        super().revive(block)
        self._ask("revive", block)

    def evict(self) -> int:
        return self.evict_many(1)[0]

    def evict_many(self, n: int) -> list[int]:
        said, call = self._ask("evict", n), f"evict({n})"
        used = [block for block in self.texts if block not in self.evictable]
        wanted = [super(ShadowCache, self).evict() for _ in range(min(n, len(self.evictable)))]
        for block in said if isinstance(said, list) else ():
            if block in used:
                raise Violation(f"{call} gave up block {block}, which a sequence is using", "evict: in use")
        if said != wanted:
            raise Violation(f"{call} gave up {said!r}, but {wanted} were unused for longest", "evict: order")
        for block in wanted:
            del self.texts[block]
        return wanted

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return self._theirs.call(method, *args)
        except StudentError as error:
            raise error.violation() from None


class LabTables(BlockTables):
    """The engine's block tables with the student's prefix cache."""

    def __init__(self, student: Any, config: EngineConfig, events: EventLog, hash_bits: int = 32) -> None:
        assert config.num_blocks is not None and config.block_size is not None
        other = config.eviction_policy or config.eviction not in (None, "lru")
        if not config.caches_prefixes or config.memory != "paged" or other:
            raise InvalidConfig("lab A6 needs memory='paged', prefix caching, and no other eviction policy")
        super().__init__(config.num_blocks, config.block_size, events)
        self.cache = self.prefix_cache = ShadowCache(student, config.block_size, hash_bits, events)
        self.pool = BlockPool(config.num_blocks, self.cache)

    def match(self, tokens: Seq[int]) -> list[Hit]:
        hits = super().match(tokens)
        self.cache.compare_match(tokens, [hit.block for hit in hits])
        return hits

    def mark_computed(self, seq_id: int, tokens: Seq[int], num_computed: int) -> None:
        prefixes, table = self._prefixes[seq_id], self.tables[seq_id]
        while (len(prefixes) + 1) * self.block_size <= num_computed:
            text = tokens[: (len(prefixes) + 1) * self.block_size]
            prefixes.append(self.cache.insert_text(text, table[len(prefixes)], table))
