"""Block tables of swapped-out sequences: whole tables move to a pool of CPU blocks and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from minipaged.core.block_table import BlockTables
from minipaged.core.plan import Copy, Write
from minipaged.core.pool import BlockPool
from minipaged.errors import InvariantViolation
from minipaged.events import EventLog, Freed, SwappedIn, SwappedOut


class SwapTables:
    """``tables``: sequence → its blocks in ``pool``, the swap space of ``num_blocks`` blocks beside ``memory``."""

    def __init__(self, memory: BlockTables, num_blocks: int, events: EventLog | None = None) -> None:
        self.memory, self.events = memory, memory.events if events is None else events
        self.pool = BlockPool(num_blocks)
        self.tables: dict[int, list[int]] = {}
        self._prefixes: dict[int, list[int]] = {}  # sequence → its prefixes, from `BlockTables.detach`

    def can_swap_out(self, seq_ids: Seq[int]) -> bool:
        """Whether the swap space has room for these sequences' blocks, each of which moves once."""
        return len({block for seq_id in seq_ids for block in self.memory.tables[seq_id]}) <= self.pool.num_free

    def swap_out(self, seq_ids: Seq[int]) -> list[Copy]:
        """Moves whole tables to the swap space (paper §4.5). Returns the copies pool → swap space."""
        moves: dict[int, int] = {}
        for seq_id in seq_ids:
            table, self._prefixes[seq_id] = self.memory.detach(seq_id)
            self.tables[seq_id] = _move(table, self.memory.pool, self.pool, moves)
            self.events.emit(SwappedOut, seq_id, table, list(self.tables[seq_id]))
        return [Copy(src, dst) for src, dst in moves.items()]

    def swap_in(self, seq_ids: Seq[int]) -> list[Copy]:
        """Moves whole tables back, to blocks that are free now. Returns the copies swap space → pool."""
        moves: dict[int, int] = {}
        for seq_id in seq_ids:
            swapped = self.tables.pop(seq_id)
            table = _move(swapped, self.pool, self.memory.pool, moves)
            self.memory.attach(seq_id, table, self._prefixes.pop(seq_id))
            self.events.emit(SwappedIn, seq_id, swapped, list(table))
        return [Copy(src, dst) for src, dst in moves.items()]

    def blocks_needed_to_swap_in(self, writes: Seq[Write]) -> int:
        """Number of free blocks that swapping these sequences in and then reserving ``writes`` takes.

        The next token counts too: otherwise a sequence could be swapped in and preempted at once.
        """
        moved = {block for write in writes for block in self.tables[write.seq_id]}
        return len(moved) + self.memory.count_blocks(writes, self.tables, self.pool)

    def free(self, seq_id: int) -> None:
        """Frees the blocks of a sequence that ends while it is swapped out."""
        blocks = self.tables.pop(seq_id)[::-1]
        del self._prefixes[seq_id]
        for block in blocks:
            self.pool.free(block)
        self.events.emit(Freed, seq_id, blocks)

    def check(self) -> None:
        """Reference counts equal occurrences in tables. Raises `InvariantViolation`."""
        self.pool.check()
        named = Counter(block for table in self.tables.values() for block in table)
        if [named[block] for block in range(self.pool.num_blocks)] != self.pool.ref_counts:
            raise InvariantViolation("reference counts of the swap space do not equal its tables")


def _move(table: list[int], source: BlockPool, target: BlockPool, moves: dict[int, int]) -> list[int]:
    """Allocates blocks of ``target`` for a table of ``source``, whose blocks are freed, tail first.

    ``moves`` (source block → target block) grows: a block that several sequences share moves once, and stays shared.
    """
    for block in table:
        if block in moves:
            target.share(moves[block])
        else:
            moves[block] = target.allocate()
    for block in reversed(table):
        source.free(block)
    return [moves[block] for block in table]
