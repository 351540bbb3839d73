"""Contiguous memory manager: one chunk of neighbouring blocks per sequence, allocated at admission."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from minipaged.core.block_table import Demand
from minipaged.core.plan import Copy, Write
from minipaged.core.prefix_cache import Hit
from minipaged.errors import BlockError, InvariantViolation
from minipaged.events import Allocated, Copied, EventLog, Freed, Shared
from minipaged.events.waste import Held, Progress, longest_reservation, reservation
from minipaged.features.contiguous.buddy import BuddyPool


@dataclass(eq=False)
class _Chunk:
    """A chunk: ``users`` read it; one of them, the ``owner``, also writes, and its table has all of the blocks."""

    blocks: range
    owner: int | None = None
    users: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Group:
    """The sequences of a request. ``asked``: minimum number of slots in each of its chunks."""

    asked: int
    chunks: list[_Chunk] = field(default_factory=list)
    members: set[int] = field(default_factory=set)


class ContiguousTables:
    """Manages contiguous chunks; ``policy`` is "orca-max", "orca-pow2" or "orca-oracle".

    A group of ``width`` sequences gets as many chunks at admission. A forked sequence reads its parent's chunk until
    its first write: then it takes one of the group's unused chunks, and all its tokens are copied there. That is
    copy-on-write of a whole sequence, which makes beam search so costly without paging (paper §4.4, §6.3).
    """

    def __init__(
        self, policy: str, num_blocks: int, block_size: int, max_model_len: int, events: EventLog | None = None
    ) -> None:
        self.policy, self.block_size = policy, block_size
        self._events = EventLog() if events is None else events
        self._longest = longest_reservation(max_model_len, num_blocks, block_size)
        # Max always reserves the same size, so its pool is split into pieces of exactly this size.
        self.pool = BuddyPool(num_blocks, unit=self.blocks_for(self._longest) if policy == "orca-max" else 1)
        self.tables: dict[int, list[int]] = {}
        self._groups: dict[int, _Group] = {}  # by sequence
        self._chunks: dict[int, _Chunk] = {}  # by sequence
        self._num_computed: dict[int, int] = {}

    # --- refusal and admission --------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold ``num_tokens`` tokens, rounded up."""
        return -(-num_tokens // self.block_size)

    def asked(self, demand: Demand) -> int:
        """Slots that the request reserves for each of its sequences."""
        return reservation(self.policy, demand.num_prompt, demand.max_output, self._longest)

    def blocks_to_hold(self, demand: Demand) -> int:
        """Number of blocks in the chunks of all its sequences, used or not."""
        return len(demand.lengths) * self.pool.rounded(self.blocks_for(self.asked(demand)))

    def refusal(self, demand: Demand) -> str | None:
        """Why even an empty pool could not serve such a request; ``None`` if it could."""
        blocks, width = self.blocks_for(self.asked(demand)), len(demand.lengths)
        capacity = self.pool.capacity(blocks)
        if capacity >= width:
            return None
        return (
            f"{self.policy} sets aside {self.pool.rounded(blocks)} neighbouring KV blocks for each of the request's "
            f"{width} sequence(s), but the pool of {self.pool.num_blocks} has room for {capacity} such chunks; "
            "shorten the prompt, lower max_tokens or raise num_blocks"
        )

    def fits(self, demand: Demand, hits: Seq[Hit] = (), outstanding: int = 0, growth: int = 0) -> bool:
        """Whether a chunk is free for each sequence. Running sequences have reserved all that they can need."""
        return self.pool.available(self.blocks_for(self.asked(demand))) >= len(demand.lengths)

    def match(self, tokens: Seq[int]) -> list[Hit]:
        """Always empty: a chunk cannot begin with blocks of another chunk, so there are no cache hits."""
        return []

    def open(self, seq_id: int, hits: Seq[Hit], demand: Demand) -> None:
        """Takes chunks for all the request's sequences, and gives the first to ``seq_id``."""
        if seq_id in self.tables:
            raise BlockError(f"sequence {seq_id} has a block table already")
        group = _Group(self.asked(demand))
        for _ in demand.lengths:
            self._grow(group)
        self._join(group, seq_id, group.chunks[0], 0)
        self.own(seq_id)

    # --- in every step ----------------------------------------------------------------------------------------

    def blocks_needed(self, writes: Collection[Write]) -> int:
        """Always 0: everything was reserved at admission."""
        return 0

    def reserve(self, write: Write) -> list[Copy]:
        """Gives a sequence a chunk to write to if it has only read so far. Returns the copies of what it has read.

        If the chunk that it reads has no owner any more, the sequence becomes its owner. If another sequence owns it,
        this one moves to an unused chunk; the owner continues in place, behind the tokens that others read.
        """
        seq_id, _, end = write
        copies: list[Copy] = []
        if self._chunks[seq_id].owner not in (None, seq_id):
            copies = self.move(seq_id)
        self.own(seq_id)
        if self.blocks_for(end) > len(self.tables[seq_id]):
            raise BlockError(f"sequence {seq_id} writes token {end - 1} beyond the end of its chunk")
        return copies

    def mark_computed(self, seq_id: int, tokens: Seq[int], num_computed: int) -> None:
        """Records how many tokens are computed: a fork shares them, and a move copies them."""
        self._num_computed[seq_id] = num_computed

    def trim(self, seq_id: int, num_tokens: int) -> list[int]:
        """Frees nothing: the whole chunk was reserved at admission."""
        return []

    # --- forks and endings ------------------------------------------------------------------------------------

    def prepare_fork(self, seq_id: int) -> bool:
        """Adds a chunk to the sequence's group for a fork; ``False`` if the allocator has none."""
        group = self._groups[seq_id]
        if not self.pool.available(self.blocks_for(group.asked)):
            return False
        self._grow(group)
        return True

    def fork(self, parent: int, child: int) -> None:
        """Lets the child read what the parent has computed; the child's table has only these blocks."""
        if child in self.tables:
            raise BlockError(f"sequence {child} has a block table already")
        num_computed = self._num_computed[parent]
        self._join(self._groups[parent], child, self._chunks[parent], num_computed)
        for logical, block in enumerate(self.tables[parent][: self.blocks_for(num_computed)]):
            self.pool.ref_counts[block] += 1
            self.tables[child].append(block)
            self._events.emit(Shared, child, logical, block, "fork")

    def free(self, seq_id: int) -> None:
        """Frees the sequence's table, and the chunks that the group has no more sequences for."""
        if seq_id not in self.tables:
            raise BlockError(f"sequence {seq_id} has no block table; was it freed twice?")
        blocks, group, chunk = self.tables.pop(seq_id)[::-1], self._groups.pop(seq_id), self._chunks.pop(seq_id)
        del self._num_computed[seq_id]
        for block in blocks:
            self.pool.ref_counts[block] -= 1
        self._leave(chunk, seq_id)
        group.members.remove(seq_id)
        # A pruned beam's chunk stays for the fork that replaces it; it is spare only if the group has fewer sequences.
        spares = [chunk for chunk in group.chunks if not chunk.users]
        for spare in spares[: max(0, len(group.chunks) - len(group.members))]:
            group.chunks.remove(spare)
            self.pool.free(spare.blocks)
        self._events.emit(Freed, seq_id, blocks)

    # --- inspection -------------------------------------------------------------------------------------------

    def held(self, progress: Iterable[Progress], waiting: Demand | None = None) -> Held:
        """Slots of all chunks, by class of waste (paper Fig. 2). Unused chunks are reserved for the longest sequence.

        While the next ``waiting`` request does not fit, all free slots are *external*: holes that cannot be used.
        """
        by_seq = {seq.seq_id: seq for seq in progress}
        total = Held()
        for group in set(self._groups.values()):
            final = max(by_seq[seq_id].final for seq_id in group.members)
            for chunk in group.chunks:
                token = max((by_seq[seq_id].num_computed for seq_id in chunk.users), default=0)
                end = max((by_seq[seq_id].final for seq_id in chunk.users), default=final)
                given = len(chunk.blocks) * self.block_size
                total += Held(token, end - token, group.asked - end, given - group.asked)
        if waiting is not None and not self.fits(waiting):
            return total._replace(external=self.pool.num_blocks * self.block_size - sum(total[:3]))
        return total

    def check(self, num_computed: Mapping[int, int] | None = None) -> None:
        """Checks that tables are prefixes of their chunks, complete for owners, and that each chunk has one group."""
        self.pool.check()
        named = Counter(block for table in self.tables.values() for block in table)
        if [named[block] for block in range(self.pool.num_blocks)] != self.pool.ref_counts:
            raise InvariantViolation("reference counts do not equal the occurrences in block tables")
        chunks = [chunk for group in set(self._groups.values()) for chunk in group.chunks]
        if sorted(chunk.blocks.start for chunk in chunks) != sorted(n * self.pool.unit for n in self.pool.chunks):
            raise InvariantViolation("the groups' chunks are not those that the allocator handed out")
        for seq_id, table in self.tables.items():
            chunk = self._chunks[seq_id]
            if chunk not in self._groups[seq_id].chunks or seq_id not in chunk.users:
                raise InvariantViolation(f"sequence {seq_id} uses a chunk that is not its group's")
            if table != list(chunk.blocks[: len(table)]) or (chunk.owner == seq_id and len(table) < len(chunk.blocks)):
                raise InvariantViolation(f"the table of sequence {seq_id} is not its chunk: {table}")
        for seq_id, count in (num_computed or {}).items():
            if self._num_computed[seq_id] != count or self.blocks_for(count) > len(self.tables[seq_id]):
                raise InvariantViolation(f"{count} tokens of sequence {seq_id} are not in its chunk")

    # --- chunks -----------------------------------------------------------------------------------------------

    def _grow(self, group: _Group) -> None:
        group.chunks.append(_Chunk(self.pool.allocate(self.blocks_for(group.asked))))

    def _join(self, group: _Group, seq_id: int, chunk: _Chunk, num_computed: int) -> None:
        group.members.add(seq_id)
        chunk.users.add(seq_id)
        self.tables[seq_id] = []
        self._groups[seq_id], self._chunks[seq_id], self._num_computed[seq_id] = group, chunk, num_computed

    def _leave(self, chunk: _Chunk, seq_id: int) -> None:
        chunk.users.remove(seq_id)
        if chunk.owner == seq_id:
            chunk.owner = None

    def own(self, seq_id: int) -> None:
        """Makes the sequence the writer of its chunk: its table gets the rest of the blocks."""
        chunk, table = self._chunks[seq_id], self.tables[seq_id]
        chunk.owner = seq_id
        for block in chunk.blocks[len(table) :]:
            self.pool.ref_counts[block] += 1
            self._events.emit(Allocated, seq_id, len(table), block)
            table.append(block)

    def move(self, seq_id: int) -> list[Copy]:
        """Moves the sequence to an unused chunk of its group; returns the copies of all its computed blocks."""
        group, table = self._groups[seq_id], self.tables[seq_id]
        if all(chunk.users for chunk in group.chunks):
            self._grow(group)
        target = next(chunk for chunk in group.chunks if not chunk.users)
        self._leave(self._chunks[seq_id], seq_id)
        target.users.add(seq_id)
        self._chunks[seq_id] = target
        copies = [Copy(src, dst) for src, dst in zip(table, target.blocks, strict=False)]
        for logical, (src, dst) in enumerate(copies):
            table[logical] = dst
            self.pool.ref_counts[src] -= 1
            self.pool.ref_counts[dst] += 1
            self._events.emit(Copied, seq_id, logical, src, dst)
        return copies
