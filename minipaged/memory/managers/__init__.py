"""The memory managers: several ways to decide who owns which slot, behind one interface.

    paged         blocks as tokens come, shared and copied on write (`memory.table.BlockTables`)
    orca-max      the longest a sequence can be, at admission (`managers.contiguous`)
    orca-pow2     its prompt, and its output rounded up to a power of two
    orca-oracle   exactly what it will need
    vattention    the same, mapped into virtual memory sequence by sequence (`virtual.VirtualTables`)

All of them answer with block tables, so that the same model and kernels run on each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import TYPE_CHECKING, Protocol

from minipaged.events import EventLog
from minipaged.memory.eviction import BY_NAME, Closing
from minipaged.memory.managers.contiguous import ContiguousTables
from minipaged.memory.managers.virtual import VirtualTables
from minipaged.memory.table import BlockTables, Copy, Demand, Hit, Write
from minipaged.memory.waste import AHEAD, Held, Moment

if TYPE_CHECKING:
    from minipaged.config import EngineConfig
    from minipaged.scheduling.plan import StepPlan


class Pool(Protocol):
    """Physical blocks 0 … ``num_blocks`` − 1. ``ref_counts[b]``: how many block tables name block b."""

    num_blocks: int
    ref_counts: list[int]

    @property
    def num_free(self) -> int:
        """Blocks that nobody has, and that could be given to somebody."""


class MemoryManager(Protocol):
    """What the scheduler and the engine ask of memory. It emits an event for every change of a block table.

    ``tables`` maps the sequences that have blocks to their block tables, ``swapped`` those that were swapped out to
    tables of ``swap_pool``. Where ``reserves_ahead`` is true, a sequence gets at admission all that it will ever need:
    then nobody is preempted, and `fits` alone decides on admission.
    """

    reserves_ahead: bool
    block_size: int
    tables: dict[int, list[int]]
    swapped: dict[int, list[int]]

    @property
    def pool(self) -> Pool: ...

    @property
    def swap_pool(self) -> Pool: ...

    # --- at the door and at admission ---

    def refusal(self, demand: Demand) -> str | None:
        """Why even an empty pool could not serve such a request, and what to do; ``None`` if it could."""

    def fits(self, demand: Demand) -> bool:
        """Whether the request could start now, as far as memory goes."""

    def blocks_to_hold(self, demand: Demand) -> int:
        """Blocks that the request occupies once all its known tokens and one more per sequence are in place."""

    def match(self, tokens: Seq[int]) -> list[Hit]:
        """The longest beginning of ``tokens`` whose KV is there already, in whole blocks. Changes nothing."""

    def open(self, seq_id: int, hits: Seq[Hit], demand: Demand) -> None:
        """Starts the table of a request's first sequence, with the blocks that `match` found."""

    # --- in every step ---

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""

    def blocks_needed(self, writes: Collection[Write]) -> int:
        """Free blocks that `reserve` will take for all of ``writes``, copies included."""

    def reserve(self, write: Write) -> list[Copy]:
        """Makes the slots of tokens [start, end) writable for their sequence. Returns what must be copied first."""

    def seal(self, plan: StepPlan) -> None:
        """The plan is complete. Adds what the runner must do for this manager beside copying and swapping."""

    def computed(self, seq_id: int, tokens: Seq[int], num_computed: int) -> None:
        """Tells that the KV of the first ``num_computed`` tokens is in place."""

    def trim(self, seq_id: int, num_tokens: int) -> list[int]:
        """Gives up blocks that this step reserved behind the first ``num_tokens`` tokens, and returns them."""

    # --- forks and endings ---

    def prepare_fork(self, seq_id: int) -> bool:
        """Sets aside what one more sequence like this one will need; ``False`` if there is too little.

        Asked before a fork that admission did not know of (`Engine.fork`); samples and beams were counted there.
        """

    def fork(self, parent: int, child: int) -> None:
        """The child starts with the parent's tokens. Nothing is copied before one of the two writes."""

    def free(self, seq_id: int) -> None:
        """Gives up the whole table, in the pool or in the swap space. `BlockError` for a sequence without one."""

    # --- preemption by swapping ---

    def can_swap_out(self, seq_ids: Seq[int]) -> bool:
        """Whether the swap space can take these sequences."""

    def swap_out(self, seq_ids: Seq[int]) -> list[Copy]:
        """Moves whole tables to the swap space. Returns the copies pool → swap space."""

    def swap_in(self, seq_ids: Seq[int]) -> list[Copy]:
        """Moves them back. Returns the copies swap space → pool."""

    def blocks_needed_to_swap_in(self, writes: Seq[Write]) -> int:
        """Free blocks that swapping these sequences in and then reserving ``writes`` takes."""

    # --- looking on ---

    def held(self, moments: Iterable[Moment]) -> Held:
        """The slots set aside now, by class of waste. ``moments``: of every sequence in ``tables``."""

    def check(self, num_computed: Mapping[int, int] | None = None) -> None:
        """Raises `InvariantViolation` if the books are wrong, or do not suit the tokens that sequences computed."""


def make_manager(config: EngineConfig, events: EventLog, closing: Closing | None = None) -> MemoryManager:
    """The manager that ``config.memory`` names. ``num_blocks`` and ``max_model_len`` must be numbers.

    ``closing`` tells from a prompt's tokens whether a user has said goodbye, for eviction by predictions.
    """
    num_blocks, block_size, max_model_len = config.num_blocks, config.block_size, config.max_model_len
    assert num_blocks is not None and block_size is not None and max_model_len is not None
    if config.memory in AHEAD:
        return ContiguousTables(config.memory, num_blocks, block_size, max_model_len, events)
    make_policy = config.eviction_policy or partial(BY_NAME[config.eviction or "lru"], config.seed, closing)
    policy = make_policy() if config.caches_prefixes else None
    paged = (num_blocks, block_size, events, config.caches_prefixes, policy, config.swap_space(num_blocks))
    if config.memory == "vattention":
        mapping = config.mapping or "async"
        return VirtualTables(*paged, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len, mapping=mapping)
    return BlockTables(*paged)
