"""Bugs that published engines have had, each put back by changing one place of one method.

A test suite is worth what it notices. `tests/test_mutants.py` brings these bugs in one at a time and asks that the
checks named beside each fail. A change to the engine that moves such a place is told here by `Mutant.applied`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from textwrap import dedent
from types import ModuleType

from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from minipaged.core.block_table import BlockTables
from minipaged.core.engine import Engine
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import LRU, PrefixCache
from minipaged.core.scheduler import Scheduler
from minipaged.core.seams import Sampling
from minipaged.events import EventLog
from minipaged.features import full_sampler as sampler
from minipaged.features.batchllm import planning as batchllm
from minipaged.features.batchllm.groups import Groups
from minipaged.features.beam_search import BeamSearch
from minipaged.features.contiguous.buddy import BuddyPool
from minipaged.features.contiguous.contiguous_tables import ContiguousTables
from minipaged.features.eviction.policies import FlushWhenAll0, LeafFirst
from minipaged.features.speculative.drafts import Speculation
from minipaged.features.static_batching import StaticBatching
from minipaged.features.swap import swap_tables
from minipaged.features.swap.swap_runner import SwapRunner
from minipaged.features.swap.swap_stage import Swap
from minipaged.features.swap.swap_tables import SwapTables
from minipaged.features.tensor_parallel.shard import Shard
from minipaged.features.vattention import slot_attention as contiguous_kernel
from minipaged.features.vattention.virtual_memory import VirtualKVCache
from minipaged.features.vattention.virtual_tables import VirtualTables
from minipaged.kernels import reference
from tests import test_engine as engine
from tests.core import test_scheduler as scheduler
from tests.core import test_tables as tables
from tests.core.test_state_machine import FIXED, MemoryMachine
from tests.execution import test_reference, test_runner
from tests.features import test_batchllm as groups
from tests.features import test_buddy as buddy
from tests.features import test_contiguous as contiguous
from tests.features import test_draft_runner as sampled_drafts
from tests.features import test_drafts as drafts
from tests.features import test_eviction as eviction
from tests.features import test_virtual as virtual
from tests.features import test_virtual_memory as virtual_memory
from tests.features.test_buddy import BuddyMachine
from tests.models import test_shard as shards
from tests.test_fuzz import Trace

Check = Callable[[], object]


def fuzz() -> None:
    """A few hundred of the fuzz's traces. A right engine needs 200 steps at most for one."""
    for seed in range(500):
        Trace(seed).run(max_steps=500)


def machine() -> None:
    """A part of the state machine's examples, not simplified when they fail."""
    some_examples(MemoryMachine, 120)


def chunks() -> None:
    """The same of the buddy allocator's."""
    some_examples(BuddyMachine, 40)


def contiguous_machine() -> None:
    """And of the contiguous managers' on top of it."""
    some_examples(contiguous.ContiguousMachine, 80)


def some_examples(machine: type[RuleBasedStateMachine], number: int) -> None:
    few = settings(FIXED, max_examples=number, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    run_state_machine_as_test(machine, settings=few)


@dataclass(frozen=True)
class Mutant:
    bug: str
    owner: type | ModuleType
    method: str
    right: str  # occurs once in the method …
    wrong: str  # … and is replaced by this
    killed_by: tuple[Check, ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        original = inspect.getattr_static(self.owner, self.method)
        function = original.fget if isinstance(original, property) else original
        source = dedent(inspect.getsource(function))
        assert source.count(self.right) == 1, f"{self.method} changed: put the bug {self.bug!r} into it anew"
        module = self.owner if isinstance(self.owner, ModuleType) else importlib.import_module(self.owner.__module__)
        scope: dict = {}
        exec(source.replace(self.right, self.wrong), vars(module), scope)
        setattr(self.owner, self.method, scope[self.method])
        try:
            yield
        finally:
            setattr(self.owner, self.method, original)


MUTANTS = [
    # --- blocks and their owners ---
    Mutant(
        "a double free is tolerated",
        BlockPool,
        "free",
        'raise BlockError(f"block {block} is freed twice")',
        "return",
        (tables.test_a_block_freed_twice_is_an_error_at_the_call,),
    ),
    Mutant(
        "block -1, counted from the end, is shared",
        BlockPool,
        "share",
        "self._check_known(block)",
        "pass",
        (tables.test_sharing_an_unknown_block_is_an_error,),
    ),
    Mutant(
        "a fork does not count its references",
        BlockTables,
        "fork",
        'self._share(child, block, "fork")',
        "self.tables[child].append(block)",
        (fuzz, machine, tables.test_a_fork_shares_every_block_and_the_first_writer_copies_the_partial_one),
    ),
    Mutant(
        "copy-on-write is forgotten",
        BlockTables,
        "reserve",
        "self.pool.ref_counts[src] > 1",
        "False",
        (fuzz, machine, partial(scheduler.test_n_samples_compute_the_prompt_once, 2)),
    ),
    Mutant(
        "the last owner copies too, though alone",
        BlockTables,
        "reserve",
        "self.pool.ref_counts[src] > 1",
        "True",
        (
            machine,
            tables.test_a_fork_shares_every_block_and_the_first_writer_copies_the_partial_one,
            partial(scheduler.test_n_samples_compute_the_prompt_once, 2),
        ),
    ),
    Mutant(
        "a fork on a block boundary copies the full block",
        BlockTables,
        "reserve",
        "range(start // self.block_size, len(table))",
        "range(max(start - 1, 0) // self.block_size, len(table))",
        (machine, tables.test_a_fork_on_a_block_boundary_copies_nothing),
    ),
    Mutant(
        "copies are not counted among the blocks a step needs",
        BlockTables,
        "count_blocks",
        "grown += sum(min(count, pool.ref_counts[block] - 1) for block, count in writers.items())",
        "pass",
        (fuzz, machine, tables.test_blocks_needed_counts_one_copy_less_than_owners_when_all_write),
    ),
    Mutant(
        "a copy is counted for every writer, the last owner included",
        BlockTables,
        "count_blocks",
        "min(count, pool.ref_counts[block] - 1)",
        "count * (pool.ref_counts[block] > 1)",
        (machine, tables.test_blocks_needed_counts_one_copy_less_than_owners_when_all_write),
    ),
    Mutant(
        "one copy of a step overwrites what another one still has to read",
        reference,
        "swap_blocks",
        "target[dst.to(target.device)] = source[src.to(source.device)].to(target.device)",
        "[target[d].copy_(source[s]) for s, d in zip(src.tolist(), dst.tolist())]",
        (test_reference.test_copies_read_before_any_write,),
    ),
    # --- prefix cache ---
    Mutant(
        "a block is registered before its KV exists",
        Scheduler,
        "place",
        "candidates = ",
        "self.memory.computed(seq.seq_id, seq.tokens, end); candidates = ",
        (engine.test_what_a_failing_step_would_have_computed_is_never_found,),
    ),
    Mutant(
        "a block is found by its own tokens, whatever came before them",
        PrefixCache,
        "lookup",
        "(parent, tokens)",
        "next((key for key in self._index if key[1] == tokens), None)",
        (fuzz, machine, tables.test_the_same_tokens_after_another_prefix_are_another_block),
    ),
    Mutant(
        "hashes are compared instead of what they stand for",
        PrefixCache,
        "lookup",
        "(parent, tokens)",
        "next((key for key in self._index if hash(key) == hash((parent, tokens))), None)",
        (tables.test_prefixes_whose_hashes_collide_are_told_apart,),
    ),
    Mutant(
        "a prompt that is cached to its end leaves nothing to compute",
        BlockTables,
        "match",
        "len(tokens), self.block_size",
        "len(tokens) + 1, self.block_size",
        (fuzz, machine, tables.test_a_fully_cached_prompt_leaves_one_token_to_compute),
    ),
    Mutant(
        "an evicted block stays in the index",
        PrefixCache,
        "evict",
        "del self.block_of[self._index.pop(key).prefix]",
        "del self.block_of[self._index[key].prefix]",
        (fuzz, machine, tables.test_an_evicted_block_leaves_the_index_and_its_twin_stays_valid),
    ),
    Mutant(
        "a block that was hit can still be evicted",
        BlockPool,
        "share",
        "self._cache.revive(block)",
        "pass",
        (fuzz, machine, tables.test_a_hit_on_a_block_without_owner_takes_it_from_the_free_count),
    ),
    Mutant(
        "a beginning is evicted before those that continue it, who can never be found again then",
        LRU,
        "leaves",
        " if self._cache.is_leaf(block)",
        "",
        (eviction.test_a_beginning_outlives_a_copy_of_it_that_others_go_on_from,),
    ),
    Mutant(
        "a block that is used for something else keeps the prediction of what it held before",
        LeafFirst,
        "evict",
        "self.bits.pop(block, None)",
        "pass",
        (eviction.test_a_block_that_is_evicted_loses_its_bit,),
    ),
    Mutant(
        "only blocks that were computed anew get the bit of a request, not those it found",
        LeafFirst,
        "note",
        "if block in self._cache]",
        "if block in self._cache and block not in self.bits]",
        (eviction.test_a_block_has_the_bit_of_its_latest_request,),
    ),
    Mutant(
        "a flush gives up what came after it, too",
        FlushWhenAll0,
        "remove",
        "self._flushed.discard(block)",
        "pass",
        (eviction.test_all_zeros_empty_the_cache,),
    ),
    Mutant(
        "heads are freed before tails",
        BlockTables,
        "free",
        "[::-1]",
        "",
        (tables.test_tails_are_evicted_before_heads,),
    ),
    Mutant(
        "hits on blocks that nobody uses are taken to be for nothing",
        BlockTables,
        "fits",
        "sum(self.pool.ref_counts[hit.block] > 0 for hit in hits)",
        "len(hits)",
        (
            fuzz,
            scheduler.test_cached_blocks_that_nobody_uses_are_not_counted_twice_at_admission,
        ),
    ),
    # --- batches in groups ---
    Mutant(
        "an open beginning costs nothing",
        batchllm,
        "best",
        "(len(node.requests) - 1) * node.depth",
        "len(node.requests) * node.depth",
        (groups.test_the_plan_is_the_best_there_is_for_random_prompts_in_whole_blocks,),
    ),
    Mutant(
        "two of a group compute the same beginning side by side",
        Groups,
        "eligible",
        "busy.add(group)",
        "pass",
        (groups.test_a_group_shares_its_blocks_while_it_lives_and_they_are_free_when_it_ends,),
    ),
    Mutant(
        "who ends at once leaves nothing to the group",
        Groups,
        "releasing",
        "self.keep(request, seq)",
        "pass",
        (groups.test_the_first_may_end_before_the_others_begin,),
    ),
    Mutant(
        "what a group has kept is never free again",
        Groups,
        "finished",
        "self.release(group)",
        "pass",
        (groups.test_a_group_shares_its_blocks_while_it_lives_and_they_are_free_when_it_ends,),
    ),
    Mutant(
        "a text ends early because of blocks that are kept for others",
        Scheduler,
        "outgrow",
        "if not any(stage.reclaim(request, plan) for stage in self.stages):",
        "if True:",
        (groups.test_what_is_kept_gives_way_before_somebody_ends_early,),
    ),
    Mutant(
        "a group takes whatever the cache holds of its prompts: more is saved than was predicted",
        Groups,
        "hits",
        "if group else",
        "if False else",
        (groups.test_nothing_but_the_group_s_beginning_is_taken_from_the_cache,),
    ),
    # --- admission and preemption ---
    Mutant(
        "admission forgets the next token",
        BlockTables,
        "blocks_to_hold",
        "length + 1",
        "length",
        (partial(scheduler.test_nobody_is_admitted_without_a_block_for_the_next_token, 0),),
    ),
    Mutant(
        "admission gives away what running prompts have yet to take",
        BlockTables,
        "fits",
        "self.pool.num_free - owed",
        "self.pool.num_free",
        (partial(scheduler.test_blocks_that_branches_are_about_to_take_are_not_given_to_others, 0),),
    ),
    Mutant(
        "max_num_seqs counts requests, not their n sequences",
        Sampling,
        "width",
        "return len(request.live)",
        "return 1",
        (scheduler.test_never_more_sequences_than_max_num_seqs,),
    ),
    Mutant(
        "prompts go before decodes and starve them",
        Scheduler,
        "_spend",
        "item[1] > 1",
        "item[1] <= 1",
        (scheduler.test_running_sequences_get_their_token_in_every_step_while_prompts_keep_arriving,),
    ),
    Mutant(
        "the earliest arrival is preempted",
        Scheduler,
        "_make_room",
        "self.running[-1]",
        "self.running[0]",
        (fuzz, scheduler.test_the_latest_arrival_is_preempted_and_its_tokens_do_not_change),
    ),
    Mutant(
        "a request that was preempted stays on the plan",
        Scheduler,
        "schedule",
        "in list(self.running):",
        "in reversed(self.running):",
        (fuzz,),
    ),
    Mutant(
        "recomputation forgets the tokens that were generated",
        Scheduler,
        "preempt",
        "seq.num_computed = 0",
        "seq.num_computed = 0; del seq.tokens[seq.num_prompt :]",
        (fuzz,),
    ),
    Mutant(
        "after its first chunk a prompt is taken to be computed",
        Scheduler,
        "commit",
        "seq.num_computed += known",
        "seq.num_computed += known if chunk.start else max(known, len(seq.tokens) - 1)",
        (fuzz, scheduler.test_a_long_prompt_is_computed_in_chunks_under_the_budget),
    ),
    Mutant(
        "preemption seeds a sequence's generator anew",
        Scheduler,
        "preempt",
        "seq.num_computed = 0",
        "seq.num_computed = 0; seq.rng.seed(str(victim.params.seed))",
        (partial(scheduler.test_draws_depend_on_neither_preemption_nor_neighbours_and_branches_differ, "recompute"),),
    ),
    Mutant(
        "all branches of a seeded request draw the same numbers",
        Engine,
        "_request",
        'Random(f"{seed}/{branch}")',
        "Random(seed)",
        (partial(scheduler.test_draws_depend_on_neither_preemption_nor_neighbours_and_branches_differ, "recompute"),),
    ),
    Mutant(
        "beams compete before all of them are computed again",
        BeamSearch,
        "target",
        "if len(live) > 1",
        "if False",
        (scheduler.test_beams_that_are_computed_again_in_chunks_wait_for_one_another,),
    ),
    # --- swapping ---
    Mutant(
        "a shared block is swapped once for each of its owners",
        swap_tables,
        "_move",
        "if block in moves:",
        "if False:",
        (fuzz, machine, tables.test_a_shared_block_is_swapped_once_and_is_shared_there_too),
    ),
    Mutant(
        "swapping loses the reference counts of shared blocks",
        swap_tables,
        "_move",
        "target.share(moves[block])",
        "pass",
        (fuzz, machine, tables.test_a_shared_block_is_swapped_once_and_is_shared_there_too),
    ),
    Mutant(
        "the swap space is taken to be endless",
        SwapTables,
        "can_swap_out",
        "<= self.pool.num_free",
        ">= 0",
        (fuzz, machine, tables.test_what_does_not_fit_into_the_swap_space_is_known_before),
    ),
    Mutant(
        "swapping in forgets the next token",
        SwapTables,
        "blocks_needed_to_swap_in",
        " + self.memory.count_blocks(writes, self.tables, self.pool)",
        "",
        (fuzz, machine, tables.test_swapping_in_counts_the_next_token_and_its_copies),
    ),
    Mutant(
        "requests are admitted while a swapped one waits",
        Swap,
        "before_admission",
        "return not self.requests_out",
        "return True",
        (scheduler.test_nobody_is_admitted_while_a_swapped_request_waits,),
    ),
    Mutant(
        "a swapped request's blocks are given back to the wrong pool",
        SwapTables,
        "free",
        "self.pool.free(block)",
        "self.memory.pool.free(block)",
        (fuzz, machine),
    ),
    Mutant(
        "blocks are swapped out after others were copied over them",
        SwapRunner,
        "execute",
        "self.space.swap_out(plan.swap_outs)",
        "self.inner.kv_cache.copy(plan.copies); self.space.swap_out(plan.swap_outs)",
        (test_runner.test_a_block_may_be_swapped_out_swapped_in_and_copied_in_one_step,),
    ),
    Mutant(
        "blocks are swapped in over what is yet to be swapped out",
        SwapRunner,
        "execute",
        "self.space.swap_out(plan.swap_outs)",
        "self.space.swap_in(plan.swap_ins); self.space.swap_out(plan.swap_outs)",
        (test_runner.test_a_block_may_be_swapped_out_swapped_in_and_copied_in_one_step,),
    ),
    Mutant(
        "a step with nothing to compute is not executed, its swaps neither",
        Engine,
        "step",
        "logits = self.runner.execute(plan)",
        "logits = self.runner.execute(plan) if plan.chunks else None",
        (engine.test_a_step_that_only_swaps_out_is_executed_too,),
    ),
    # --- contiguous memory and static batches ---
    Mutant(
        "free buddies are not joined",
        BuddyPool,
        "free",
        "while start ^ length in self._free.get(length, ()):",
        "while False:",
        (fuzz, chunks, buddy.test_a_chunk_is_cut_in_halves_and_joined_again),
    ),
    Mutant(
        "a chunk is cut, and its other half lost",
        BuddyPool,
        "allocate",
        "self._free[found].add(start + found)",
        "pass",
        (fuzz, chunks, buddy.test_a_chunk_is_cut_in_halves_and_joined_again),
    ),
    Mutant(
        "a fork takes a chunk of its own and forgets to copy",
        ContiguousTables,
        "reserve",
        "copies = self._move(seq_id)",
        "self._move(seq_id)",
        (fuzz, contiguous_machine, partial(contiguous.test_beams_are_the_same_and_copy_more, "orca-max")),
    ),
    Mutant(
        "a fork writes into the chunk of its parent",
        ContiguousTables,
        "reserve",
        "self._chunks[seq_id].owner not in (None, seq_id)",
        "False",
        (fuzz, contiguous_machine, contiguous.test_an_owner_writes_in_place_behind_what_others_read),
    ),
    Mutant(
        "a request is admitted with a chunk for the first of its sequences only",
        ContiguousTables,
        "fits",
        ">= len(demand.lengths)",
        ">= 1",
        (fuzz, contiguous_machine),
    ),
    Mutant(
        "samples that have ended keep their chunks from others",
        ContiguousTables,
        "free",
        "max(0, len(group.chunks) - len(group.members))",
        "0 if group.members else None",
        (contiguous.test_samples_that_end_give_their_chunks_back_and_beams_keep_theirs,),
    ),
    Mutant(
        "a fork by hand counts on a chunk that others may take",
        ContiguousTables,
        "prepare_fork",
        "self._grow(group)",
        "pass",
        (contiguous_machine, partial(contiguous.test_a_fork_by_hand_takes_a_chunk_or_is_refused, "orca-max")),
    ),
    Mutant(
        "a static batch takes in whoever comes",
        StaticBatching,
        "eligible",
        "[] if self.scheduler.running else waiting",
        "waiting",
        (fuzz, partial(scheduler.test_a_static_batch_ends_with_its_longest_request_before_anybody_joins, "paged")),
    ),
    Mutant(
        "a static batch ends with its prompts' token budget",
        StaticBatching,
        "limits",
        "super().limits(request)._replace(needs_tokens=False)",
        "FCFS.limits(self, request)",
        (scheduler.test_a_static_batch_is_as_large_as_memory_allows_whatever_the_token_budget,),
    ),
    # --- endings ---
    Mutant(
        "a subscriber that raises breaks off the step",
        EventLog,
        "emit",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        (engine.test_a_subscriber_that_raises_is_left_out_and_told_of_and_the_step_is_whole,),
    ),
    Mutant(
        "an abort forgets to free",
        Scheduler,
        "abort",
        'request.decoding.end(request, list(request.live), "abort", self)',
        '[request.end(s, "abort") for s in [*request.live]]; request in self.running and self.running.remove(request)',
        (fuzz, partial(engine.test_an_abort_in_any_state_gives_every_block_back_and_twice_is_fine, 3)),
    ),
    Mutant(
        "a failed step loses the blocks it had reserved",
        Engine,
        "_give_up",
        "self.scheduler.abort(request)",
        "self.scheduler.running.remove(request)",
        (partial(engine.test_a_failing_step_is_reported_and_the_engine_goes_on, "runner"),),
    ),
    Mutant(
        "who was swapped out by a failed step goes on without having been copied",
        Swap,
        "failed",
        "[request for request in plan.preempted if request.status is Status.SWAPPED]",
        "[]",
        (engine.test_a_request_that_a_failing_step_swapped_out_is_aborted_with_it,),
    ),
    Mutant(
        "a branch that outgrows the pool takes the others with it",
        Scheduler,
        "outgrow",
        "request.live[-1:]",
        "list(request.live)",
        (scheduler.test_of_branches_that_outgrow_the_pool_the_last_gives_way_to_the_others,),
    ),
    # --- speculation ---
    Mutant(
        "blocks of rejected tokens are kept",
        BlockTables,
        "trim",
        "len(table) > self.blocks_for(num_tokens)",
        "False",
        (fuzz, drafts.test_wrong_guesses_give_their_blocks_back_and_are_never_found_in_the_cache),
    ),
    Mutant(
        "rejected tokens count as computed",
        Speculation,
        "sampled",
        "seq.num_computed += accepted",
        "seq.num_computed += len(chunk.draft)",
        (fuzz,),
    ),
    Mutant(
        "the prefix cache hears of tokens before they are accepted",
        Scheduler,
        "commit",
        "known = chunk.num_tokens - len(chunk.draft)",
        "known = chunk.num_tokens",
        (fuzz, drafts.test_wrong_guesses_give_their_blocks_back_and_are_never_found_in_the_cache),
    ),
    Mutant(
        "what follows an end within a right guess is said too",
        Sampling,
        "advance",
        "if seq.finish_reason is not None:",
        "if False:",
        (fuzz, partial(drafts.test_what_ends_a_text_in_the_midst_of_a_right_guess_ends_it_there, 2)),
    ),
    Mutant(
        "everybody guesses with the whole of what is left of the budget",
        Speculation,
        "planned",
        "budget -= len(chunk.draft)",
        "pass",
        (drafts.test_guesses_take_only_what_is_left_of_budget_and_blocks,),
    ),
    Mutant(
        "a guess is longer than the blocks that are free",
        Speculation,
        "_place",
        "> memory.pool.num_free",
        "> memory.pool.num_blocks",
        (fuzz, drafts.test_nobody_is_preempted_for_a_guess),
    ),
    Mutant(
        "others fork off a sequence together with the blocks of its guess",
        Speculation,
        "planned",
        "not scheduler.forking(request)",
        "True",
        (drafts.test_who_computes_for_others_too_does_not_guess,),
    ),
    Mutant(
        "in place of a rejected token any is drawn, likely to have been guessed or not",
        sampler,
        "rejection_sample",
        "(target[i] - guess[i]).clamp_min(0)",
        "target[i]",
        (partial(sampled_drafts.test_rejection_sampling_follows_the_model_whatever_was_guessed, "close"),),
    ),
    Mutant(
        "guesses are accepted as often as the model would say them, however likely they were guessed",
        sampler,
        "rejection_sample",
        "rng.random() * guess[i, token]",
        "rng.random()",
        (partial(sampled_drafts.test_rejection_sampling_follows_the_model_whatever_was_guessed, "close"),),
    ),
    # --- virtual memory ---
    Mutant(
        "a slot goes on showing the page that was copied on write",
        VirtualTables,
        "map_slots",
        "self.mapped[slot][: len(table)] != table",
        "len(self.mapped[slot]) < len(table)",
        (partial(virtual.test_mapping_decides_nothing, 3),),
    ),
    Mutant(
        "a page is taken away from a slot that is read",
        VirtualTables,
        "_map",
        "not self._is_read(*other)",
        "True",
        (virtual.test_a_prefix_hit_and_a_fork_show_one_page_in_two_slots,),
    ),
    Mutant(
        "books are believed although a mapping failed",
        VirtualTables,
        "map_slots",
        "not all(maps.done for maps in self._plans)",
        "False",
        (partial(virtual.test_after_a_failed_mapping_nobody_reads_what_was_not_mapped, "sync", 3),),
    ),
    Mutant(
        "of the fitting slots the largest is reused",
        VirtualTables,
        "_settle",
        "-len(mapped), -slot",
        "len(mapped), -slot",
        (virtual.test_of_the_idle_slots_the_best_fit_is_reused,),
    ),
    Mutant(
        "a step does not wait for what the last began to map",
        VirtualKVCache,
        "remap",
        "self.wait()",
        "pass",
        (
            virtual_memory.test_nothing_is_mapped_while_the_background_still_maps,
            virtual_memory.test_what_fails_in_the_background_is_raised_before_the_next_maps,
        ),
    ),
    Mutant(
        "a step is called done while its background may yet fail",
        VirtualKVCache,
        "_apply_ahead",
        "maps.done = False",
        "pass",
        (virtual_memory.test_what_fails_in_the_background_is_raised_before_the_next_maps,),
    ),
    Mutant(
        "a sliding window over slots is one token too long",
        contiguous_kernel,
        "attention",
        "length - len(queries) + 1 - sliding_window",
        "length - len(queries) - sliding_window",
        (partial(virtual_memory.test_attention_on_slots_equals_attention_on_blocks, False, 5, 1),),
    ),
    Mutant(
        "a prompt over slots sees what comes after it",
        contiguous_kernel,
        "_prefill",
        "is_causal=visible is None",
        "is_causal=False",
        (partial(virtual_memory.test_attention_on_slots_equals_attention_on_blocks, False, None, 1),),
    ),
    # --- tensor parallelism ---
    Mutant(
        "a bias counts once for every rank",
        Shard,
        "join",
        "linear.bias.zero_()",
        "pass",
        (shards.test_only_one_summand_has_the_bias,),
    ),
    Mutant(
        "of queries, keys and values side by side the first rank gets the queries",
        Shard,
        "part",
        '3 if "c_attn" in name else 1',
        "1",
        (shards.test_of_fused_projections_each_is_shared_out,),
    ),
]
