"""Lab A8: memory mapped when it is needed (vAttention), an order that shares (BatchLLM), a cache that listens.

You write what raises NotImplementedError. README.md, beside this file, says what it must do.
"""

from __future__ import annotations

from typing import Any


class OutOfPages(MemoryError):
    """Running sequences need all pages."""


class VirtualMemory:
    """Gives the pages of a GPU to slots: ranges of addresses, with a place for each page that a sequence may need.

    ``driver`` maps: ``driver.map(slot, place, page)`` and ``driver.unmap(slot, place)``. Both are slow.
    """

    def __init__(self, driver: Any, num_pages: int, page_size: int, num_slots: int) -> None:
        self.driver, self.page_size = driver, page_size  # page_size: tokens
        self.free = list(range(num_pages))  # pages that are mapped nowhere
        self.mapped: list[list[int]] = [[] for _ in range(num_slots)]  # slot → pages at its places 0, 1, 2, …
        self.needed = [0] * num_slots  # slot → how many of its places a running sequence needs; 0: idle

    # lab: A8.1, A8.2
    def ensure(self, slot: int, num_tokens: int) -> None:
        """A sequence runs in this slot and is about to have ``num_tokens`` tokens: maps what it lacks for them.

        Raises OutOfPages, and changes nothing, if other running sequences need too many of the pages.
        """
        need = -(-num_tokens // self.page_size)
        pages = self.mapped[slot]
        lacking = need - len(pages)
        unused = [len(self.mapped[other]) - self.needed[other] for other in range(len(self.mapped)) if other != slot]
        if lacking > len(self.free) + sum(unused):
            raise OutOfPages(f"{lacking} pages are lacking, {len(self.free)} are free and {sum(unused)} unused")
        self.needed[slot] = need
        while len(pages) < need:
            page = self.free.pop() if self.free else self.reclaim()
            self.driver.map(slot, len(pages), page)
            pages.append(page)

    # lab: A8.2
    def reclaim(self) -> int:
        """Unmaps a page that no running sequence needs, and returns it. There must be one."""
        slot = next(slot for slot, pages in enumerate(self.mapped) if len(pages) > self.needed[slot])
        self.driver.unmap(slot, len(self.mapped[slot]) - 1)
        return self.mapped[slot].pop()

    # lab: A8.2
    def release(self, slot: int) -> None:
        """The slot's sequence has ended. Its pages stay mapped: the next one in this slot may need as many."""
        self.needed[slot] = 0


# lab: A8.3
def order_requests(prompts: list[list[int]], num_outputs: list[int]) -> list[int]:
    """An order in which a cache of the previous prompt saves as many tokens as any order can.

    Of those orders, one whose groups (prompts with the same first token) come by outputs per computed token, largest
    first. Returns indices of ``prompts``, each of which has at least one token.
    """
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        groups.setdefault(prompts[index][0], []).append(index)

    def ratio(group: list[int]) -> float:
        computed = {tuple(prompts[index][:end]) for index in group for end in range(1, len(prompts[index]) + 1)}
        return sum(num_outputs[index] for index in group) / len(computed)

    return [index for group in sorted(groups.values(), key=ratio, reverse=True) for index in group]


class ListeningPolicy:
    """Which cached block is given up first, by predictions of one bit."""

    def __init__(self) -> None:
        # Blocks that nobody uses → (the block before it in its text, or None; its bit). Unused for longest comes first.
        self.blocks: dict[int, tuple[int | None, int]] = {}
        self.given_up: set[int] = set()  # those that go before all others

    # lab: A8.4
    def add(self, block: int, parent: int | None, bit: int) -> None:
        """Nobody uses ``block`` any more. Bit 1: it is predicted that nobody will; 0: that somebody will."""
        self.blocks[block] = parent, bit

    # lab: A8.4
    def remove(self, block: int) -> None:
        """Somebody has found ``block`` and uses it again."""
        del self.blocks[block]
        self.given_up.discard(block)

    # lab: A8.4
    def evict(self) -> int:
        """Chooses a block that nobody uses, forgets it and returns it. There is one."""
        parents = {parent for parent, _ in self.blocks.values()}
        leaves = [block for block in self.blocks if block not in parents]
        ones = [block for block in leaves if self.blocks[block][1]]
        if not self.given_up and not ones:
            self.given_up = set(self.blocks)
        block = next(block for block in leaves if block in self.given_up) if self.given_up else ones[0]
        self.remove(block)
        return block
