"""The student's block pool inside the real engine, watched at every call."""

from __future__ import annotations

from typing import Any

from minipaged.config import EngineConfig
from minipaged.core.block_table import BlockTables
from minipaged.errors import InvalidConfig, InvariantViolation
from minipaged.events import EventLog
from minipaged.labs.student import StudentError, Violation


class ShadowPool:
    """A `BlockPool` whose blocks the student's code chooses. Its own reference counts say what was right.

    Every call is checked at once: the first that breaks a rule raises a `Violation` that names it.
    """

    def __init__(self, student: Any, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._pool = student.new("BlockPool", num_blocks)
        self._expect_free("BlockPool(…)")

    @property
    def num_free(self) -> int:
        return self.ref_counts.count(0)

    def allocate(self) -> int:
        call = "allocate()"
        block = self._ask("allocate")
        if type(block) is not int:
            raise Violation(f"{call} returned {block!r}, which is no block id", "allocate: no id")
        if not 0 <= block < self.num_blocks:
            last = self.num_blocks - 1
            raise Violation(f"{call} returned {block}, but blocks are numbered 0 to {last}", "allocate: range")
        if self.ref_counts[block]:
            count = _times(self.ref_counts[block])
            raise Violation(f"{call} handed out block {block}, which is still referenced {count}", "allocate: in use")
        self.ref_counts[block] = 1
        self._expect_free(call)
        return block

    def share(self, block: int) -> None:
        self._ask("incref", block)
        self.ref_counts[block] += 1
        self._expect_free(f"incref({block})")

    def free(self, block: int) -> None:
        self._ask("decref", block)
        self.ref_counts[block] -= 1
        self._expect_free(f"decref({block})")

    def check(self) -> None:
        if min(self.ref_counts, default=0) < 0:
            raise InvariantViolation(f"reference counts below zero: {self.ref_counts}")

    def _ask(self, method: str, *args: int) -> Any:
        """All that the engine asks for is possible: whatever the student's code raises is wrong."""
        try:
            return self._pool.call(method, *args)
        except StudentError as error:
            raise error.violation() from None

    def _expect_free(self, call: str) -> None:
        try:
            said = self._pool.get("num_free")
        except StudentError as error:
            raise error.violation() from None
        if said != self.num_free or type(said) is not int:
            raise Violation(f"after {call}, num_free is {said!r} instead of {self.num_free}", "num_free")


class LabTables(BlockTables):
    """The engine's block tables over the student's pool."""

    def __init__(self, student: Any, config: EngineConfig, events: EventLog) -> None:
        assert config.num_blocks is not None and config.block_size is not None
        if config.caches_prefixes or config.memory != "paged":
            raise InvalidConfig("lab A1 needs memory='paged' and no prefix caching")
        super().__init__(config.num_blocks, config.block_size, events, False)
        self.pool = ShadowPool(student, config.num_blocks)  # type: ignore[assignment]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
