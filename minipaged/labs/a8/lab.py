"""Lab A8: vAttention's mapping on demand, BatchLLM's order of requests, and eviction that listens to predictions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from minipaged.core.plan import Write
from minipaged.core.prefix_cache import PrefixCache
from minipaged.features.eviction.policies import FlushWhenAll0
from minipaged.features.vattention.virtual_tables import VirtualTables
from minipaged.labs.a8 import reference
from minipaged.labs.lab import Lab, Mutant, Source, Task


def engine() -> dict[str, Any]:
    """The engine's vAttention manager, told which slot to take.

    Its order of a batch (`batchllm.planning.plan`) has groups with one level of sharing, and no cache of the previous
    prompt to suit: the lab's own order stands in.
    """

    class OutOfPages(MemoryError):
        pass

    class Tables(VirtualTables):
        def _settle(self, seq_id: int, need: int) -> None:
            self.slots[seq_id] = seq_id
            self._owners[seq_id] = seq_id

    class VirtualMemory:
        def __init__(self, driver: Any, num_pages: int, page_size: int, num_slots: int) -> None:
            settings: dict[str, Any] = {"max_model_len": num_pages * page_size, "mapping": "sync"}
            self.engine = Tables(num_pages, page_size, enable_prefix_caching=False, max_num_seqs=num_slots, **settings)
            self.driver, self.lengths = driver, dict[int, int]()

        def ensure(self, slot: int, num_tokens: int) -> None:
            write = Write(slot, self.lengths.get(slot, 0), num_tokens)
            lacking = self.engine.blocks_for(num_tokens) - len(self.engine.tables.get(slot, ()))
            if lacking > self.engine.pool.num_free:
                raise OutOfPages
            if slot not in self.engine.tables:
                self.engine.open(slot)
            self.engine.reserve(write)
            self.lengths[slot] = num_tokens
            chunk = SimpleNamespace(
                seq=SimpleNamespace(seq_id=slot), num_tokens=1, block_table=self.engine.tables[slot]
            )
            plan: Any = SimpleNamespace(chunks=[chunk], maps=None)
            self.engine.map_slots(plan)
            plan.maps.done = True
            for shown in plan.maps.maps:  # the engine unmaps all at once, before; here it is page by page
                for gone in plan.maps.unmaps:
                    if gone.page == shown.page:
                        self.driver.unmap(gone.slot, gone.logical)
                self.driver.map(*shown)

        def release(self, slot: int) -> None:
            self.engine.free(slot)
            del self.lengths[slot]

    class ListeningPolicy(FlushWhenAll0):
        def __init__(self) -> None:
            super().__init__(lambda tokens: False)
            self.bits, self.parents = dict[int, bool](), dict[int, int | None]()
            self.bind(cast(PrefixCache, self))  # here it knows by itself what it asks of a cache

        def add(self, block: int, parent: int | None = None, bit: int = 0) -> None:
            self.bits[block], self.parents[block] = bool(bit), parent
            super().add(block)

        def is_leaf(self, block: int) -> bool:
            return not any(self.parents[other] == block for other in self._blocks)

    names = {"VirtualMemory": VirtualMemory, "ListeningPolicy": ListeningPolicy}
    return names | {"order_requests": reference.order_requests}


MUTANTS = (
    Mutant(
        "a sequence that ends just at a page's end gets a page more, which is wasted",
        "A8.1",
        "need = -(-num_tokens // self.page_size)",
        "need = num_tokens // self.page_size + 1",
    ),
    Mutant(
        "memory runs out in the midst: what was mapped until then is lost",
        "A8.1",
        "if lacking > len(self.free) + sum(unused):",
        "if not self.free and lacking > sum(unused):",
    ),
    Mutant(
        "a page is taken from a sequence that runs",
        "A8.2",
        "if len(pages) > self.needed[slot])",
        "if pages)",
    ),
    Mutant(
        "pages of a sequence that has ended count as free while they are still mapped, and are mapped twice",
        "A8.2",
        "        self.needed[slot] = 0\n",
        "        self.needed[slot] = 0\n        self.free += self.mapped[slot]\n",
    ),
    Mutant(
        "pages are unmapped as soon as a sequence ends, and mapped again for the next one",
        "A8.2",
        "        self.needed[slot] = 0\n",
        "        self.needed[slot] = 0\n        while self.mapped[slot]:\n"
        "            self.driver.unmap(slot, len(self.mapped[slot]) - 1)\n"
        "            self.free.append(self.mapped[slot].pop())\n",
    ),
    Mutant(
        "pages that a shorter sequence does not need count as needed: none are left, though most are unused",
        "A8.2",
        "self.needed[slot] = need\n",
        "self.needed[slot] = max(need, len(pages))\n",
    ),
    Mutant(
        "prompts are grouped by their first token only: longer shared beginnings are computed again",
        "A8.3",
        "sorted(range(len(prompts)), key=prompts.__getitem__)",
        "range(len(prompts))",
    ),
    Mutant(
        "groups with long prompts and short outputs come first",
        "A8.3",
        "key=ratio, reverse=True",
        "key=ratio",
    ),
    Mutant(
        "a beginning is evicted, and all that continues it can never be found again, but stays",
        "A8.4",
        "leaves = [block for block in self.blocks if block not in parents]",
        "leaves = list(self.blocks)",
    ),
    Mutant(
        "of the blocks with bit 1 the one goes that was used last",
        "A8.4",
        "else ones[0]",
        "else ones[-1]",
    ),
    Mutant(
        "if all bits are 0, one block goes and not all: whoever is predicted wrongly fills the cache for ever",
        "A8.4",
        "        self.remove(block)\n        return block",
        "        self.remove(block)\n        self.given_up.clear()\n        return block",
    ),
    Mutant(
        "a block that was found in time is evicted next all the same",
        "A8.4",
        "self.given_up.discard(block)",
        "pass",
    ),
)

LAB = Lab(
    key="A8",
    title="Pages on demand (vAttention), an order that shares (BatchLLM), a cache that listens",
    minutes=100,
    file="later_papers.py",
    sources=(Source("minipaged.labs.a8.reference"),),
    tasks=(
        Task("A8.1", "Map what is needed", 3),
        Task("A8.2", "Leave mapped, reclaim late", 4, needs=("A8.1",)),
        Task("A8.3", "An order of requests", 3),
        Task("A8.4", "Listen to predictions", 3),
    ),
    mutants=MUTANTS,
    engine=engine,
)
