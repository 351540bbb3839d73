"""Mutants of the engine: bugs that published engines have had, each inserted by changing one place of one method.

A test suite is only as good as the bugs it detects. `tests/test_mutants.py` inserts these bugs one at a time, and the
checks listed with each must fail. If a change to the engine moves such a place, `Mutant.applied` reports it.
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
    """Runs 500 traces of the fuzz test. A correct engine needs at most 200 steps for one."""
    for seed in range(500):
        Trace(seed).run(max_steps=500)


def machine() -> None:
    """Runs a part of the memory state machine's examples, without shrinking failures."""
    some_examples(MemoryMachine, 120)


def chunks() -> None:
    """Runs a part of the buddy allocator's examples."""
    some_examples(BuddyMachine, 40)


def contiguous_machine() -> None:
    """Runs a part of the contiguous managers' examples."""
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
        assert source.count(self.right) == 1, f"{self.method} changed: adapt the mutant {self.bug!r}"
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
        "block -1 is accepted and counts from the end of the pool",
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
        "a write into a shared block does not copy it",
        BlockTables,
        "reserve",
        "self.pool.ref_counts[src] > 1",
        "False",
        (fuzz, machine, partial(scheduler.test_n_samples_compute_the_prompt_once, 2)),
    ),
    Mutant(
        "the last owner copies, too, although its reference count is 1",
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
        "a step's needed blocks do not include its copies",
        BlockTables,
        "count_blocks",
        "grown += sum(min(count, pool.ref_counts[block] - 1) for block, count in writers.items())",
        "pass",
        (fuzz, machine, tables.test_blocks_needed_counts_one_copy_less_than_owners_when_all_write),
    ),
    Mutant(
        "a copy is counted for every writer, including the last owner",
        BlockTables,
        "count_blocks",
        "min(count, pool.ref_counts[block] - 1)",
        "count * (pool.ref_counts[block] > 1)",
        (machine, tables.test_blocks_needed_counts_one_copy_less_than_owners_when_all_write),
    ),
    Mutant(
        "one copy of a step overwrites a block that another copy has yet to read",
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
        "self.memory.mark_computed(seq.seq_id, seq.tokens, end); candidates = ",
        (engine.test_what_a_failing_step_would_have_computed_is_never_found,),
    ),
    Mutant(
        "a block is found by its own tokens, without its prefix",
        PrefixCache,
        "lookup",
        "(parent, tokens)",
        "next((key for key in self._index if key[1] == tokens), None)",
        (fuzz, machine, tables.test_the_same_tokens_after_another_prefix_are_another_block),
    ),
    Mutant(
        "hashes are compared instead of tokens",
        PrefixCache,
        "lookup",
        "(parent, tokens)",
        "next((key for key in self._index if hash(key) == hash((parent, tokens))), None)",
        (tables.test_prefixes_whose_hashes_collide_are_told_apart,),
    ),
    Mutant(
        "a fully cached prompt leaves no token to compute",
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
        "a block that was hit remains evictable",
        BlockPool,
        "share",
        "self._cache.revive(block)",
        "pass",
        (fuzz, machine, tables.test_a_hit_on_a_block_without_owner_takes_it_from_the_free_count),
    ),
    Mutant(
        "a prefix block is evicted before its children, which can then never be hit again",
        LRU,
        "leaves",
        " if self._cache.is_leaf(block)",
        "",
        (eviction.test_a_beginning_outlives_a_copy_of_it_that_others_go_on_from,),
    ),
    Mutant(
        "a reused block keeps the prediction for its previous content",
        LeafFirst,
        "evict",
        "self.bits.pop(block, None)",
        "pass",
        (eviction.test_a_block_that_is_evicted_loses_its_bit,),
    ),
    Mutant(
        "only computed blocks get a request's prediction bit, not those that it hit",
        LeafFirst,
        "note",
        "if block in self._cache]",
        "if block in self._cache and block not in self.bits]",
        (eviction.test_a_block_has_the_bit_of_its_latest_request,),
    ),
    Mutant(
        "a flush also evicts blocks that were cached after it",
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
        "hits on blocks without owners are not subtracted from the free blocks",
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
        "an open prefix costs nothing",
        batchllm,
        "best",
        "(len(node.requests) - 1) * node.depth",
        "len(node.requests) * node.depth",
        (groups.test_the_plan_is_the_best_there_is_for_random_prompts_in_whole_blocks,),
    ),
    Mutant(
        "two requests of a group compute the same prefix concurrently",
        Groups,
        "eligible",
        "busy.add(group)",
        "pass",
        (groups.test_a_group_shares_its_blocks_while_it_lives_and_they_are_free_when_it_ends,),
    ),
    Mutant(
        "a leader that ends in its first step does not keep the prefix for its group",
        Groups,
        "releasing",
        "self.keep(request, seq)",
        "pass",
        (groups.test_the_first_may_end_before_the_others_begin,),
    ),
    Mutant(
        "a group's kept blocks are never freed",
        Groups,
        "finished",
        "self.release(group)",
        "pass",
        (groups.test_a_group_shares_its_blocks_while_it_lives_and_they_are_free_when_it_ends,),
    ),
    Mutant(
        "a sequence ends early because blocks are kept for a group",
        Scheduler,
        "outgrow",
        "if not any(stage.reclaim(request, plan) for stage in self.stages):",
        "if True:",
        (groups.test_what_is_kept_gives_way_before_somebody_ends_early,),
    ),
    Mutant(
        "a group uses accidental cache hits and saves more than predicted",
        Groups,
        "hits",
        "if group else",
        "if False else",
        (groups.test_nothing_but_the_group_s_beginning_is_taken_from_the_cache,),
    ),
    # --- admission and preemption ---
    Mutant(
        "admission ignores the next token",
        BlockTables,
        "blocks_to_hold",
        "length + 1",
        "length",
        (partial(scheduler.test_nobody_is_admitted_without_a_block_for_the_next_token, 0),),
    ),
    Mutant(
        "admission gives away blocks that running prefills still need",
        BlockTables,
        "fits",
        "self.pool.num_free - outstanding",
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
        "prefills go before decodes and starve them",
        Scheduler,
        "_spend",
        "pair[1] > 1",
        "pair[1] <= 1",
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
        "recomputation drops generated tokens",
        Scheduler,
        "preempt",
        "seq.num_computed = 0",
        "seq.num_computed = 0; del seq.tokens[seq.num_prompt :]",
        (fuzz,),
    ),
    Mutant(
        "after its first chunk, a prompt counts as computed",
        Scheduler,
        "commit",
        "seq.num_computed += known",
        "seq.num_computed += known if chunk.start else max(known, len(seq.tokens) - 1)",
        (fuzz, scheduler.test_a_long_prompt_is_computed_in_chunks_under_the_budget),
    ),
    Mutant(
        "preemption resets a sequence's random generator",
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
        "beams compete before all of them are recomputed",
        BeamSearch,
        "target",
        "if len(live) > 1",
        "if False",
        (scheduler.test_beams_that_are_computed_again_in_chunks_wait_for_one_another,),
    ),
    # --- swapping ---
    Mutant(
        "a shared block is swapped once per owner",
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
        "the swap space is assumed to be unlimited",
        SwapTables,
        "can_swap_out",
        "<= self.pool.num_free",
        ">= 0",
        (fuzz, machine, tables.test_what_does_not_fit_into_the_swap_space_is_known_before),
    ),
    Mutant(
        "swapping in ignores the next token",
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
        "a swapped request's blocks are freed in the wrong pool",
        SwapTables,
        "free",
        "self.pool.free(block)",
        "self.memory.pool.free(block)",
        (fuzz, machine),
    ),
    Mutant(
        "blocks are swapped out after copies have overwritten them",
        SwapRunner,
        "execute",
        "self.space.swap_out(plan.swap_outs)",
        "self.inner.kv_cache.copy(plan.copies); self.space.swap_out(plan.swap_outs)",
        (test_runner.test_a_block_may_be_swapped_out_swapped_in_and_copied_in_one_step,),
    ),
    Mutant(
        "blocks are swapped in before swap-outs have read their targets",
        SwapRunner,
        "execute",
        "self.space.swap_out(plan.swap_outs)",
        "self.space.swap_in(plan.swap_ins); self.space.swap_out(plan.swap_outs)",
        (test_runner.test_a_block_may_be_swapped_out_swapped_in_and_copied_in_one_step,),
    ),
    Mutant(
        "a step without tokens to compute is not executed, so its swaps are lost",
        Engine,
        "step",
        "logits = self.runner.execute(plan)",
        "logits = self.runner.execute(plan) if plan.chunks else None",
        (engine.test_a_step_that_only_swaps_out_is_executed_too,),
    ),
    # --- contiguous memory and static batches ---
    Mutant(
        "free buddies are not merged",
        BuddyPool,
        "free",
        "while start ^ length in self._free.get(length, ()):",
        "while False:",
        (fuzz, chunks, buddy.test_a_chunk_is_cut_in_halves_and_joined_again),
    ),
    Mutant(
        "a chunk is split and its other half is lost",
        BuddyPool,
        "allocate",
        "self._free[found].add(start + found)",
        "pass",
        (fuzz, chunks, buddy.test_a_chunk_is_cut_in_halves_and_joined_again),
    ),
    Mutant(
        "a fork takes a new chunk without copying",
        ContiguousTables,
        "reserve",
        "copies = self.move(seq_id)",
        "self.move(seq_id)",
        (fuzz, contiguous_machine, partial(contiguous.test_beams_are_the_same_and_copy_more, "orca-max")),
    ),
    Mutant(
        "a fork writes into its parent's chunk",
        ContiguousTables,
        "reserve",
        "self._chunks[seq_id].owner not in (None, seq_id)",
        "False",
        (fuzz, contiguous_machine, contiguous.test_an_owner_writes_in_place_behind_what_others_read),
    ),
    Mutant(
        "a request is admitted with a chunk for only its first sequence",
        ContiguousTables,
        "fits",
        ">= len(demand.lengths)",
        ">= 1",
        (fuzz, contiguous_machine),
    ),
    Mutant(
        "ended samples keep their chunks",
        ContiguousTables,
        "free",
        "max(0, len(group.chunks) - len(group.members))",
        "0 if group.members else None",
        (contiguous.test_samples_that_end_give_their_chunks_back_and_beams_keep_theirs,),
    ),
    Mutant(
        "a manual fork does not reserve its chunk",
        ContiguousTables,
        "prepare_fork",
        "self._grow(group)",
        "pass",
        (contiguous_machine, partial(contiguous.test_a_fork_by_hand_takes_a_chunk_or_is_refused, "orca-max")),
    ),
    Mutant(
        "a static batch admits requests while it runs",
        StaticBatching,
        "eligible",
        "[] if self.scheduler.running else waiting",
        "waiting",
        (fuzz, partial(scheduler.test_a_static_batch_ends_with_its_longest_request_before_anybody_joins, "paged")),
    ),
    Mutant(
        "the token budget limits the size of a static batch",
        StaticBatching,
        "limits",
        "super().limits(request)._replace(needs_tokens=False)",
        "FCFS.limits(self, request)",
        (scheduler.test_a_static_batch_is_as_large_as_memory_allows_whatever_the_token_budget,),
    ),
    # --- endings ---
    Mutant(
        "a subscriber that raises aborts the step",
        EventLog,
        "emit",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        (engine.test_a_subscriber_that_raises_is_left_out_and_told_of_and_the_step_is_whole,),
    ),
    Mutant(
        "an abort does not free blocks",
        Scheduler,
        "abort",
        'request.decoding.end(request, list(request.live), "abort", self)',
        '[request.end(s, "abort") for s in [*request.live]]; request in self.running and self.running.remove(request)',
        (fuzz, partial(engine.test_an_abort_in_any_state_gives_every_block_back_and_twice_is_fine, 3)),
    ),
    Mutant(
        "a failed step loses its reserved blocks",
        Engine,
        "give_up",
        "self.scheduler.abort(request)",
        "self.scheduler.running.remove(request)",
        (partial(engine.test_a_failing_step_is_reported_and_the_engine_goes_on, "runner"),),
    ),
    Mutant(
        "a request that a failed step swapped out continues without its copied blocks",
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
        "draft tokens enter the prefix cache before they are accepted",
        Scheduler,
        "commit",
        "known = chunk.num_tokens - len(chunk.draft)",
        "known = chunk.num_tokens",
        (fuzz, drafts.test_wrong_guesses_give_their_blocks_back_and_are_never_found_in_the_cache),
    ),
    Mutant(
        "draft tokens after the end of a sequence are output, too",
        Sampling,
        "advance",
        "if seq.finish_reason is not None:",
        "if False:",
        (fuzz, partial(drafts.test_what_ends_a_text_in_the_midst_of_a_right_guess_ends_it_there, 2)),
    ),
    Mutant(
        "each sequence drafts with the whole remaining token budget",
        Speculation,
        "planned",
        "budget -= len(chunk.draft)",
        "pass",
        (drafts.test_guesses_take_only_what_is_left_of_budget_and_blocks,),
    ),
    Mutant(
        "a draft needs more than the free blocks",
        Speculation,
        "_place",
        "> memory.pool.num_free",
        "> memory.pool.num_blocks",
        (fuzz, drafts.test_nobody_is_preempted_for_a_guess),
    ),
    Mutant(
        "a sequence drafts before its siblings fork from it, so they share the draft's blocks",
        Speculation,
        "planned",
        "not scheduler.forking(request)",
        "True",
        (drafts.test_who_computes_for_others_too_does_not_guess,),
    ),
    Mutant(
        "a rejected token is resampled from the target instead of the residual distribution",
        sampler,
        "rejection_sample",
        "(target[i] - guess[i]).clamp_min(0)",
        "target[i]",
        (partial(sampled_drafts.test_rejection_sampling_follows_the_model_whatever_was_guessed, "close"),),
    ),
    Mutant(
        "draft tokens are accepted with the target's probability, not its ratio to the draft's",
        sampler,
        "rejection_sample",
        "rng.random() * guess[i, token]",
        "rng.random()",
        (partial(sampled_drafts.test_rejection_sampling_follows_the_model_whatever_was_guessed, "close"),),
    ),
    # --- virtual memory ---
    Mutant(
        "after copy-on-write, a slot still maps the old page",
        VirtualTables,
        "map_slots",
        "self.mapped[slot][: len(table)] != table",
        "len(self.mapped[slot]) < len(table)",
        (partial(virtual.test_mapping_decides_nothing, 3),),
    ),
    Mutant(
        "a page is unmapped from a slot that the step reads",
        VirtualTables,
        "_map",
        "not self._is_read(*other)",
        "True",
        (virtual.test_a_prefix_hit_and_a_fork_show_one_page_in_two_slots,),
    ),
    Mutant(
        "recorded maps are trusted after a mapping has failed",
        VirtualTables,
        "map_slots",
        "not all(maps.done for maps in self._plans)",
        "False",
        (partial(virtual.test_after_a_failed_mapping_nobody_reads_what_was_not_mapped, "sync", 3),),
    ),
    Mutant(
        "the largest fitting slot is reused, not the smallest",
        VirtualTables,
        "_settle",
        "-len(mapped), -slot",
        "len(mapped), -slot",
        (virtual.test_of_the_idle_slots_the_best_fit_is_reused,),
    ),
    Mutant(
        "a step does not wait for the last step's background maps",
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
        "a step's maps count as done before its background maps are",
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
        "a prompt over slots attends to later tokens",
        contiguous_kernel,
        "_prefill",
        "is_causal=visible is None",
        "is_causal=False",
        (partial(virtual_memory.test_attention_on_slots_equals_attention_on_blocks, False, None, 1),),
    ),
    # --- tensor parallelism ---
    Mutant(
        "a bias is added once per rank",
        Shard,
        "join",
        "linear.bias.zero_()",
        "pass",
        (shards.test_only_one_summand_has_the_bias,),
    ),
    Mutant(
        "a fused projection is split as a whole, so the first rank gets no values",
        Shard,
        "part",
        '3 if "c_attn" in name else 1',
        "1",
        (shards.test_of_fused_projections_each_is_shared_out,),
    ),
]
