"""Typical bugs of paged engines, and the tests that would detect them here.

Each row is a bug that published engines have had, or that this design invites, or the behaviour that avoids it.
`test_every_pitfall_has_its_tests` keeps the list valid: a renamed or removed test must be replaced here, too.
"""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from minipaged.config import EngineConfig, SamplingParams

ROOT = Path(__file__).parent.parent
TABLES = "tests/core/test_tables.py"
MACHINE = "tests/core/test_state_machine.py::TestMemory"
SCHEDULER = "tests/core/test_scheduler.py"
ENGINE = "tests/test_engine.py"
FUZZ = "tests/test_fuzz.py::test_random_traces_give_the_tokens_of_an_unbatched_loop"
LLM = "tests/test_llm.py"
STREAM = "tests/text/test_stream.py"
SAMPLER = "tests/execution/test_sampler.py"
DRAFTS = "tests/features/test_drafts.py"
SPECULATION = "tests/features/test_draft_runner.py"
KERNELS = "tests/execution/test_reference.py"

PITFALLS = {
    "a block or a block table is freed twice, or was never allocated: an error at the call": [
        f"{TABLES}::test_a_block_freed_twice_is_an_error_at_the_call",
        f"{TABLES}::test_freeing_an_unknown_block_is_an_error",
        f"{TABLES}::test_freeing_a_sequence_twice_is_an_error",
    ],
    "writing into a shared block: copied first, and the last owner writes in place": [
        f"{TABLES}::test_a_fork_shares_every_block_and_the_first_writer_copies_the_partial_one",
        f"{SCHEDULER}::test_n_samples_compute_the_prompt_once",
        MACHINE,
    ],
    "a fork when the last block is exactly full: nothing is copied": [
        f"{TABLES}::test_a_fork_on_a_block_boundary_copies_nothing"
    ],
    "no block left for a copy: copies are counted beforehand": [
        f"{TABLES}::test_blocks_needed_counts_one_copy_less_than_owners_when_all_write",
        f"{SCHEDULER}::test_blocks_that_branches_are_about_to_take_are_not_given_to_others",
        FUZZ,
    ],
    "a copy reads a block that another copy of the same step has overwritten": [
        f"{KERNELS}::test_copies_read_before_any_write",
    ],
    "the whole prompt is cached: at least one token is computed, with the same result": [
        f"{TABLES}::test_a_fully_cached_prompt_leaves_one_token_to_compute",
        f"{SCHEDULER}::test_a_second_identical_prompt_computes_only_what_is_not_cached",
    ],
    "a block is reserved, but its step never runs: the prefix cache must not find it": [
        f"{TABLES}::test_a_reserved_block_is_not_found_before_its_kv_exists",
        f"{ENGINE}::test_what_a_failing_step_would_have_computed_is_never_found",
    ],
    "two prefixes with equal hashes are confused": [
        f"{TABLES}::test_prefixes_whose_hashes_collide_are_told_apart",
        f"{TABLES}::test_the_same_tokens_after_another_prefix_are_another_block",
    ],
    "an evicted block cannot be hit, and other blocks with the same content stay valid": [
        f"{TABLES}::test_an_evicted_block_leaves_the_index_and_its_twin_stays_valid",
        MACHINE,
    ],
    "the last blocks of a finished sequence are evicted before its first": [
        f"{TABLES}::test_tails_are_evicted_before_heads"
    ],
    "a cached free block is counted twice, as free and as a hit": [
        f"{TABLES}::test_a_hit_on_a_block_without_owner_takes_it_from_the_free_count",
        f"{SCHEDULER}::test_cached_blocks_that_nobody_uses_are_not_counted_twice_at_admission",
    ],
    "identical prompts admitted in one step never read each other's unfinished blocks": [
        f"{ENGINE}::test_identical_prompts_in_one_step_each_get_their_tokens"
    ],
    "a request that is preempted while decoding continues with the same tokens": [
        f"{SCHEDULER}::test_the_latest_arrival_is_preempted_and_its_tokens_do_not_change",
        f"{LLM}::test_tokens_survive_both_kinds_of_preemption",
        "tests/test_tiny_fuzz.py::test_random_traces_give_the_tokens_of_transformers",
    ],
    "a request that is planned and then preempted leaves the plan and the token budget": [
        f"{SCHEDULER}::test_a_preempted_request_leaves_the_plan_and_its_tokens_are_not_counted"
    ],
    "a preempted request shares blocks with others, which keep them": [
        f"{SCHEDULER}::test_preemption_takes_only_references_from_blocks_that_others_share",
        f"{TABLES}::test_a_block_that_others_still_use_is_copied_out_and_only_loses_a_reference",
    ],
    "recomputing several branches restores all of them and the blocks that they share": [
        f"{SCHEDULER}::test_a_preempted_group_comes_back_with_all_its_branches_sharing_what_still_agrees",
        f"{SCHEDULER}::test_beams_that_are_computed_again_in_chunks_wait_for_one_another",
    ],
    "swapping moves a shared block once and keeps its reference count": [
        f"{TABLES}::test_a_shared_block_is_swapped_once_and_is_shared_there_too",
        MACHINE,
    ],
    "a request is swapped in without a block for the next token, and swapped out again at once": [
        f"{TABLES}::test_swapping_in_counts_the_next_token_and_its_copies",
        f"{SCHEDULER}::test_nobody_is_admitted_without_a_block_for_the_next_token",
    ],
    "the swap space is full: the request is recomputed instead": [
        f"{TABLES}::test_what_does_not_fit_into_the_swap_space_is_known_before",
        FUZZ,
    ],
    "new requests are admitted before swapped-out ones": [
        f"{SCHEDULER}::test_nobody_is_admitted_while_a_swapped_request_waits"
    ],
    "a block is swapped out, swapped in and the target of a copy in one step": [
        "tests/execution/test_runner.py::test_a_block_may_be_swapped_out_swapped_in_and_copied_in_one_step"
    ],
    "a step without tokens to compute still has blocks to move": [
        f"{ENGINE}::test_a_step_that_only_swaps_out_is_executed_too",
        "tests/execution/test_runner.py::test_a_step_without_chunks_has_no_logits",
    ],
    "block sizes that are not powers of two, and 1": [
        f"{TABLES}::test_a_table_grows_only_when_its_last_block_is_full",
        f"{KERNELS}::test_decode_equals_dense_attention",
        f"{KERNELS}::test_prefill_equals_dense_attention_for_prompts_and_for_later_chunks",
        f"{LLM}::test_greedy_tokens_equal_transformers",
    ],
    "a prompt that can never fit is rejected when it is added": [
        f"{ENGINE}::test_a_bad_request_is_refused_at_the_door_and_the_others_go_on"
    ],
    "the only running sequence outgrows the pool: it ends, and nothing hangs": [
        f"{SCHEDULER}::test_a_lone_sequence_that_outgrows_the_pool_ends_with_length",
        f"{SCHEDULER}::test_of_branches_that_outgrow_the_pool_the_last_gives_way_to_the_others",
    ],
    "prompts keep arriving: each decoding sequence still gets a token in every step": [
        f"{SCHEDULER}::test_running_sequences_get_their_token_in_every_step_while_prompts_keep_arriving",
        f"{SCHEDULER}::test_decodes_come_first_in_the_plan",
    ],
    "a request with n samples counts as n sequences": [f"{SCHEDULER}::test_never_more_sequences_than_max_num_seqs"],
    "captured batch sizes omit a max_num_seqs that is not a power of two": [
        "tests/features/test_cuda_graphs.py::test_some_graph_covers_every_batch_and_little_of_it_is_padding",
        "tests/features/test_cuda_graphs.py::test_tokens_are_the_same_with_graphs_and_each_size_is_recorded_once",
    ],
    "an abort in any state, even twice, frees every block": [
        f"{ENGINE}::test_an_abort_in_any_state_gives_every_block_back_and_twice_is_fine",
        f"{ENGINE}::test_an_abort_while_swapped_out_gives_the_swap_space_back",
        FUZZ,
    ],
    "branches of a seeded request differ, and repeat": [
        f"{LLM}::test_n_samples_share_the_prompt_and_each_equals_a_lone_run_of_its_branch",
        f"{SCHEDULER}::test_draws_depend_on_neither_preemption_nor_neighbours_and_branches_differ",
    ],
    "random draws depend on other requests in the batch or on preemption": [
        f"{LLM}::test_seeded_results_repeat_and_do_not_depend_on_batch_or_preemption",
        f"{SAMPLER}::test_a_draw_does_not_depend_on_its_neighbours",
    ],
    "a stop string that spans tokens is removed completely, and no part of it is streamed before": [
        f"{STREAM}::test_a_stop_string_is_held_back_while_it_may_still_come",
        f"{STREAM}::test_pieces_join_to_the_whole_decoding_cut_at_the_stop",
    ],
    "a character whose bytes span tokens is streamed whole, and an incomplete one once at the end": [
        f"{STREAM}::test_an_incomplete_tail_is_flushed_once",
        f"{STREAM}::test_any_tokens_at_all_byte_level",
        f"{STREAM}::test_any_tokens_at_all_byte_fallback",
    ],
    "speculation: rejected tokens leave blocks, cache entries or random numbers behind": [
        f"{DRAFTS}::test_wrong_guesses_give_their_blocks_back_and_are_never_found_in_the_cache",
        f"{SPECULATION}::test_a_seed_gives_the_same_tokens_whatever_is_guessed",
        FUZZ,
    ],
    "speculation changes the probabilities of tokens": [
        f"{SPECULATION}::test_rejection_sampling_follows_the_model_whatever_was_guessed",
        f"{SPECULATION}::test_with_a_draft_model_whole_texts_are_as_likely_as_without",
    ],
    "speculation: tokens are output after an accepted token that ends the sequence": [
        f"{DRAFTS}::test_what_ends_a_text_in_the_midst_of_a_right_guess_ends_it_there",
    ],
    "speculation: a draft model's KV is not in the blocks of the model's KV": [
        f"{SPECULATION}::test_a_model_that_drafts_for_itself_is_always_right",
    ],
    "each of several end-of-text tokens ends a sequence": [
        "tests/models/test_loader.py::test_eos_token_ids_come_from_all_three_files",
        f"{LLM}::test_end_of_text_ends_as_in_transformers",
    ],
    "settings at the ends of their range are exactly greedy or exactly unfiltered": [
        f"{SAMPLER}::test_temperature_zero_is_greedy_whatever_else_is_set",
        f"{SAMPLER}::test_settings_that_filter_nothing_leave_every_token_reachable",
        f"{SAMPLER}::test_top_k_one_and_a_tiny_top_p_are_greedy",
    ],
    "a parameter is accepted and then ignored": [
        "tests/test_pitfalls.py::test_every_parameter_is_read_somewhere",
        f"{ENGINE}::test_sampling_values_that_make_no_sense_are_refused_by_name",
        f"{ENGINE}::test_settings_that_make_no_sense_are_refused_by_name",
    ],
    "two engines in one process share hidden state": [
        f"{ENGINE}::test_two_engines_with_different_block_sizes_do_not_affect_one_another",
        f"{LLM}::test_two_engines_in_one_process",
    ],
    "a step fails: its requests end, every block is freed, the next request works": [
        f"{ENGINE}::test_a_failing_step_is_reported_and_the_engine_goes_on",
        f"{ENGINE}::test_a_request_that_a_failing_step_swapped_out_is_aborted_with_it",
        f"{ENGINE}::test_ctrl_c_inside_a_step_frees_its_requests",
        f"{LLM}::test_a_failed_step_reaches_whoever_waits_and_the_next_request_works",
    ],
}


def collected_from(path: Path) -> set[str]:
    """Names that pytest collects from ``path``: functions, classes, and test cases of state machines."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name.startswith(("test_", "Test"))}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_every_pitfall_has_its_tests(pitfall):
    proof = PITFALLS[pitfall]
    assert proof and len(set(proof)) == len(proof)
    for node_id in proof:
        file, _, name = node_id.partition("::")
        assert name in collected_from(ROOT / file), node_id


@pytest.mark.parametrize("settings", [SamplingParams, EngineConfig])
def test_every_parameter_is_read_somewhere(settings):
    """Parameters are read outside config.py, which only checks them: as attributes, or by name as in ``getattr``."""
    read = set()
    for path in (ROOT / "minipaged").rglob("*.py"):
        if path.name != "config.py":
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not [field.name for field in fields(settings) if field.name not in read]
