"""The GPU's driver, as the student's code sees it: every mapping is watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.labs.checking import Tape
from minipaged.labs.student import Remote, StudentError, Violation, expect


class Driver:
    """What is mapped where. The first call that breaks a rule raises a `Violation`."""

    def __init__(self, num_pages: int, num_slots: int, say: Callable[[str], None]) -> None:
        self.num_pages, self.num_slots, self._say = num_pages, num_slots, say
        self.shown: dict[tuple[int, int], int] = {}  # (slot, place) → page
        self.needed = [0] * num_slots  # slot → places that its running sequence needs

    def map(self, slot: Any, place: Any, page: Any) -> None:
        call = f"driver.map(slot={slot}, place={place}, page={page})"
        self._say(f"  {call}")
        self._expect_place(call, slot, place)
        if type(page) is not int or not 0 <= page < self.num_pages:
            raise Violation(f"{call}: the GPU has pages 0 to {self.num_pages - 1}", "page")
        if (slot, place) in self.shown:
            raise Violation(f"{call}: page {self.shown[slot, place]} is mapped there already", "place mapped twice")
        for other, shown in self.shown.items():
            if shown == page:
                where = f"slot {other[0]}, place {other[1]}"
                raise Violation(f"{call}: that page is mapped in {where}, too", "page mapped twice")
        if place >= self.needed[slot]:
            raise Violation(f"{call}: {self.needed[slot]} places are needed there, so this is one too many", "too much")
        self.shown[slot, place] = page

    def unmap(self, slot: Any, place: Any) -> None:
        call = f"driver.unmap(slot={slot}, place={place})"
        self._say(f"  {call}")
        self._expect_place(call, slot, place)
        if (slot, place) not in self.shown:
            raise Violation(f"{call}: nothing is mapped there", "unmapped")
        if place < self.needed[slot]:
            raise Violation(f"{call}: the sequence that runs in slot {slot} needs this place", "taken away")
        if len(self.shown) < self.num_pages:
            raise Violation(f"{call}, though there are pages that are mapped nowhere", "too early")
        del self.shown[slot, place]

    def _expect_place(self, call: str, slot: Any, place: Any) -> None:
        if type(slot) is not int or not 0 <= slot < self.num_slots or type(place) is not int or place < 0:
            raise Violation(f"{call}: there are slots 0 to {self.num_slots - 1}, with places from 0 on", "no place")


class ShadowMemory:
    """The student's `VirtualMemory`, and what must be mapped after each call."""

    def __init__(self, student: Any, num_pages: int, page_size: int, num_slots: int, tape: Tape) -> None:
        self.page_size, self.tape = page_size, tape
        self.driver = Driver(num_pages, num_slots, tape.say)
        remote = Remote("driver", self.driver, ("map", "unmap"))
        self._memory = student.new("VirtualMemory", remote, num_pages, page_size, num_slots)
        self.lengths = [0] * num_slots  # of running sequences; 0: the slot is idle

    def ensure(self, slot: int, num_tokens: int) -> None:
        call, needed = f"ensure({slot}, {num_tokens})", self.driver.needed
        need = -(-num_tokens // self.page_size)
        others, num_pages = sum(needed) - needed[slot], self.driver.num_pages
        if need + others > num_pages:
            self._refuse(call, slot, num_tokens, f"it needs {need} of {num_pages} pages, others {others}")
            return
        needed[slot], self.lengths[slot] = need, num_tokens
        self.tape.say(call)
        self._ask(call, "ensure", slot, num_tokens)
        for place in range(need):
            if (slot, place) not in self.driver.shown:
                raise Violation(f"after {call}, in pages of {self.page_size}, place {place} has no page", "too little")

    def _refuse(self, call: str, slot: int, num_tokens: int, why: str) -> None:
        self.tape.say(f"{call} must raise OutOfPages: {why}")
        before = dict(self.driver.shown)
        expect(lambda: self._memory.call("ensure", slot, num_tokens), "OutOfPages", call, why)
        if self.driver.shown != before:
            raise Violation(f"{call} raised OutOfPages, but has mapped or unmapped pages before", "half done")

    def release(self, slot: int) -> None:
        self.driver.needed[slot] = self.lengths[slot] = 0
        self.tape.say(f"release({slot})")
        self._ask(f"release({slot})", "release", slot)

    def _ask(self, call: str, method: str, *args: int) -> None:
        try:
            self._memory.call(method, *args)
        except StudentError as error:
            raise error.violation() from None
