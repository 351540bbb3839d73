"""Bookkeeping of speculation: which tokens are drafted, for which sequences, and how rejected drafts are removed."""

from random import Random
from unittest.mock import patch

import pytest

from minipaged.config import SamplingParams
from minipaged.core.plan import StepPlan
from minipaged.core.request import Sequence
from minipaged.features.speculative.drafts import PromptLookup, speculation_of
from tests import fake
from tests.fake import fake_engine, next_token, random_prompt, unbatched


def lookup(tokens, count=4):
    return PromptLookup()(Sequence(0, list(tokens), 1, Random()), count)


@pytest.mark.parametrize(
    "tokens, guess",
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9]),  # the latest match counts
        ([7, 1, 2, 3, 8, 1, 2, 9, 7, 1, 2], [3, 8, 1, 2]),  # unless an earlier match is longer
        ([1, 2, 3, 1, 2], [3, 1, 2, 3]),  # a repetition is continued
        ([5, 5, 5], [5, 5, 5, 5]),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 1], []),  # a match of one token is too short
        ([1], []),
        ([1, 1], []),
    ],
)
def test_prompt_lookup_guesses_what_followed_the_last_time(tokens, guess):
    assert lookup(tokens) == guess
    assert lookup(tokens, 2) == guess[:2]


def test_prompt_lookup_on_a_growing_sequence_is_prompt_lookup_from_scratch():
    random, propose = Random(1), PromptLookup()
    seq = Sequence(0, [random.randrange(3)], 1, Random())
    while len(seq.tokens) < 200:
        assert propose(seq, 3) == PromptLookup()(seq, 3)
        seq.tokens += [random.randrange(3) for _ in range(random.randint(1, 5))]


def speculating(right=1.0, **settings):
    """An engine whose draft tokens are right with probability ``right``, and its speculation events."""
    engine, told = fake_engine(speculate="prompt-lookup", **settings), []
    random = Random(3)

    def propose(seq, count):
        tokens = list(seq.tokens)
        for _ in range(count):
            tokens.append(next_token(tokens, 0) if random.random() < right else random.randrange(50))
        return tokens[len(seq.tokens) :]

    speculation_of(engine).propose = propose
    engine.events.subscribe(lambda event: told.append(event) if event.type == "speculated" else None)
    return engine, told


def finish(engine):
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
        engine.check()
    return done


LONG = SamplingParams(max_tokens=21, ignore_eos=True)


def test_right_guesses_give_five_tokens_a_step():
    engine, told = speculating()
    engine.add_request("a", [1, 2, 3], LONG)
    engine.step()  # the prefill's token
    assert [len(engine.step()[0].outputs[0].token_ids) for _ in range(4)] == [6, 11, 16, 21]
    assert not engine.has_unfinished()
    assert [(event.proposed, event.accepted, event.blocks) for event in told] == [(4, 4, [])] * 4


def test_wrong_guesses_give_their_blocks_back_and_are_never_found_in_the_cache():
    engine, told = speculating(right=0.0, block_size=2, num_blocks=40)
    speculation_of(engine).propose = lambda seq, count: [(next_token(seq.tokens, 0) + 1) % 50] * count
    engine.add_request("a", [1, 2, 3], LONG)
    engine.step()
    for _ in range(10):
        before = engine.block_tables()[0]
        (output,) = engine.step()
        tokens = [1, 2, 3, *output.outputs[0].token_ids]
        assert engine.block_tables()[0][: len(before)] == before
        assert len(engine.block_tables()[0]) == len(tokens) // 2, "as many blocks as without drafts"
        assert told[-1].accepted == 0 and len(told[-1].blocks) == 2
        cached = engine.memory.match([*tokens, tokens[-1]])
        assert len(cached) == (len(tokens) - 1) // 2
    assert engine.memory.pool.num_free == 40 - len(engine.block_tables()[0])


def test_guesses_take_only_what_is_left_of_budget_and_blocks():
    engine, told = speculating(max_num_seqs=3, max_num_batched_tokens=9, num_blocks=200)
    plans, execute = [], engine.runner.execute
    engine.runner.execute = lambda plan: plans.append(plan) or execute(plan)
    for name in "ab":
        engine.add_request(name, [ord(name) % 50] * 3, LONG)
    engine.step()
    engine.step()
    assert [len(chunk.draft) for chunk in plans[-1].chunks] == [4, 3], "the oldest sequence drafts first"
    engine.add_request("c", [4] * 30, LONG)
    engine.step()
    assert {chunk.request.request_id: (chunk.num_tokens, chunk.draft) for chunk in plans[-1].chunks} == {
        "a": (1, []), "b": (1, []), "c": (7, [])
    }  # fmt: skip
    finish(engine)
    assert max(plan.num_tokens for plan in plans) == 9


def test_nobody_is_preempted_for_a_guess():
    engine, told = speculating(num_blocks=8, block_size=2)
    seen = []
    engine.events.subscribe(lambda event: seen.append(event.type))
    engine.add_request("a", [1] * 6, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add_request("b", [2] * 6, SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    engine.step()
    assert [(event.seq_id, event.proposed) for event in told] == [(0, 1), (1, 1)], "drafts fill the last block only"
    assert len(finish(engine)["b"].token_ids) == 9
    assert told[-1].proposed == 4 and "preempted" not in seen


@pytest.mark.parametrize("end", range(1, 6))
def test_what_ends_a_text_in_the_midst_of_a_right_guess_ends_it_there(end):
    truth = unbatched([1, 2, 3], LONG, 0, 200)
    engine, _ = speculating(num_speculative_tokens=5)
    engine.add_request("length", [1, 2, 3], SamplingParams(max_tokens=end, ignore_eos=True))
    assert finish(engine)["length"].token_ids == truth[:end]
    first = truth.index(truth[end])
    engine.add_request("stop", [1, 2, 3], SamplingParams(max_tokens=21, ignore_eos=True, stop_token_ids=[truth[end]]))
    output = finish(engine)["stop"]
    assert output.token_ids == truth[: first + 1] and output.finish_reason == "stop"


def test_samples_speculate_each_for_itself_and_beams_not_at_all():
    engine, told = speculating(right=0.7)
    engine.add_request("n", [1, 2, 3], SamplingParams(n=3, max_tokens=12, ignore_eos=True))
    engine.add_request("beams", [4, 5], SamplingParams(temperature=0, beam_width=3, max_tokens=12))
    names = {seq.seq_id: request for request in engine.scheduler.waiting for seq in request.seqs}
    prompts = {name: random_prompt(Random(5), 9) for name in ("x", "y")}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, LONG)
    done = finish(engine)
    assert {names[e.seq_id].request_id for e in told if e.seq_id in names} == {"n"}
    assert len({e.seq_id for e in told}) == 5
    for name, prompt in prompts.items():
        assert done[name].token_ids == unbatched(prompt, LONG, 0, 200)


def test_who_computes_for_others_too_does_not_guess():
    """Two samples have equal tokens; only the second drafts. After preemption, the second forks from the first."""
    engine, told = speculating(block_size=1, num_blocks=60)
    guess = speculation_of(engine).propose
    speculation_of(engine).propose = lambda seq, count: guess(seq, count if seq.seq_id or len(told) > 1 else 0)
    with patch.object(fake, "next_token", lambda context, branch: next_token(context, 0)):
        engine.add_request("a", [1, 2, 3], SamplingParams(n=2, max_tokens=21, ignore_eos=True))
        for _ in range(3):
            engine.step()
        (request,) = engine.scheduler.running
        assert [seq.num_output for seq in request.live] == [3, 11] and [event.seq_id for event in told] == [1, 1]
        engine.scheduler.preempt(request, StepPlan(3))
        engine.step()  # the prefix cache has all but the first one's newest token
        engine.check()
        assert [seq.num_output for seq in request.live] == [4, 11] and len(told) == 2
        finish(engine)
    assert request.seqs[0].tokens == request.seqs[1].tokens and len(request.seqs[0].tokens) == 24


def test_a_model_may_say_what_was_guessed_and_yet_not_accept_the_guess():
    """Rounding in rejection sampling can do this. The newest token's KV is then still to be computed."""
    engine, told = speculating()
    sampler = engine.sampler
    engine.sampler = lambda *step: [token if i == 0 else None for i, token in enumerate(sampler(*step))]
    engine.add_request("a", [1, 2, 3], LONG)
    for count in range(1, 22):
        assert len(engine.step()[0].outputs[0].token_ids) == count
        engine.check()
    assert not engine.has_unfinished() and {event.accepted for event in told} == {0}


def test_a_step_that_fails_leaves_nothing_of_its_guesses():
    engine, _ = speculating(num_blocks=20)
    engine.add_request("a", [1, 2, 3], LONG)
    engine.step()
    sampler, engine.sampler = engine.sampler, lambda *_: 1 / 0
    with pytest.raises(RuntimeError, match="aborted: a"):
        engine.step()
    engine.check()
    assert engine.memory.pool.num_free == 20
    engine.sampler = sampler
    engine.add_request("a", [1, 2, 3], LONG)
    assert finish(engine)["a"].token_ids == unbatched([1, 2, 3], LONG, 0, 200)
