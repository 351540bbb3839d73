"""Speculation as bookkeeping: what is guessed, who may guess, and that nothing of a wrong guess is left behind."""

from random import Random

import pytest

from minipaged.config import SamplingParams
from minipaged.request import Sequence
from minipaged.scheduling.speculative import PromptLookup
from tests.fake import fake_engine, next_token, random_prompt, unbatched


def lookup(tokens, count=4):
    return PromptLookup()(Sequence(0, list(tokens), 1, Random()), count)


@pytest.mark.parametrize(
    "tokens, guess",
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9]),  # the latest time counts
        ([7, 1, 2, 3, 8, 1, 2, 9, 7, 1, 2], [3, 8, 1, 2]),  # unless the time before had more in common
        ([1, 2, 3, 1, 2], [3, 1, 2, 3]),  # what repeats goes on repeating
        ([5, 5, 5], [5, 5, 5, 5]),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 1], []),  # one token is no precedent
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
