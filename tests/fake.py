"""A model without torch, for fuzzing everything between the front door and the tensors.

KV is a dict from slot to (position, token). The next token is a hash of the context *as read through the block table*,
so one wrong, stale or missing slot changes every token after it.
"""

from __future__ import annotations

from itertools import count
from random import Random
from zlib import crc32

from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.request import Sequence
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.plan import Chunk, SampledToken, StepPlan

VOCAB = 50
EOS = 7


def next_token(context: list[int], branch: int) -> int:
    return crc32(repr((context, branch)).encode()) % VOCAB


def next_logprobs(context: list[int]) -> dict[int, float]:
    """Distinct log-probabilities of all tokens, for beam searches."""
    random = Random(crc32(repr(context).encode()))
    return {token: -rank / 3 - random.random() for rank, token in enumerate(random.sample(range(VOCAB), VOCAB))}


def unbatched(prompt: list[int], params: SamplingParams, branch: int, max_len: int, output: tuple = ()) -> list[int]:
    """What a loop over one sequence gives: the truth that every schedule must reproduce."""
    tokens = [*prompt, *output]
    while True:
        tokens.append(next_token(tokens, branch))
        ended = tokens[-1] == EOS and not params.ignore_eos
        if ended or len(tokens) - len(prompt) == params.max_tokens or len(tokens) >= max_len:
            return tokens[len(prompt) :]


def unbatched_beams(prompt: list[int], params: SamplingParams, max_len: int) -> list[list[int]]:
    """A beam search over plain lists: no blocks, no forks, every context read from scratch."""
    search = BeamSearch(params, frozenset() if params.ignore_eos else frozenset({EOS}))
    room = max_len - len(prompt)
    max_output = min(params.max_tokens or room, room)
    ids = count()
    live = [Sequence(next(ids), list(prompt), len(prompt), Random())]
    while not search.done:
        rows = [(seq, _top(next_logprobs(seq.tokens), search.candidates_per_beam)) for seq in live]
        going, ended = search.choose(rows, max_output)

        def grown(c):
            seq = c.parent.copy(next(ids))
            seq.tokens.append(c.token.token_id)
            seq.cumulative_logprob = c.score
            return seq

        for c in ended:
            search.add(c.score, grown(c))
        live = [grown(c) for c in going]
        search.update_done(going, rows[0][0].num_output + 1, max_output)
    return [seq.output_tokens for _, seq in search.finished[: params.n]]


def _top(logprobs: dict[int, float], number: int) -> SampledToken:
    best = sorted(logprobs, key=lambda token: -logprobs[token])[:number]
    return SampledToken(best[0], {token: logprobs[token] for token in best})


class FakeRunner:
    """Executes plans on dicts, in the order the real runner has: swap-out, swap-in, copy, write, read."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, tuple[int, int]] = {}
        self.swap: dict[int, tuple[int, int]] = {}

    def execute(self, plan: StepPlan) -> list[list[int]]:
        self._move(plan.swap_outs, self.slots, self.swap)
        self._move(plan.swap_ins, self.swap, self.slots)
        self._move(plan.copies, self.slots, self.slots)
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, start=chunk.start):
                self.slots[self._slot(chunk, position)] = (position, token)
        return [self._read(chunk) for chunk in plan.chunks]

    def _move(self, copies: list, source: dict, target: dict) -> None:
        size = self.block_size
        moved = {copy.dst * size + i: source.get(copy.src * size + i) for copy in copies for i in range(size)}
        assert len(moved) == size * len(copies), "two copies into one block"
        target.update({slot: value for slot, value in moved.items() if value is not None})

    def _slot(self, chunk: Chunk, position: int) -> int:
        return chunk.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _read(self, chunk: Chunk) -> list[int]:
        values = [self.slots[self._slot(chunk, position)] for position in range(chunk.start + chunk.num_tokens)]
        assert [position for position, _ in values] == list(range(len(values))), "a slot holds another position"
        return [token for _, token in values]


def fake_sampler(contexts: list[list[int]], plan: StepPlan) -> list[SampledToken]:
    return [
        _top(next_logprobs(context), chunk.request.beams.candidates_per_beam)
        if chunk.request.beams
        else SampledToken(next_token(context, chunk.request.seqs.index(seq)))
        for context, chunk in zip(contexts, plan.chunks, strict=True)
        for seq in chunk.samples
    ]


def fake_engine(**settings: object) -> Engine:
    """An engine on the fake model. Takes the fields of EngineConfig."""
    defaults: dict = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    config = EngineConfig(model="fake", **(defaults | {"max_model_len": 200} | settings))
    return Engine(
        config,
        FakeRunner(config.block_size),
        fake_sampler,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )


def random_prompt(random: Random, longest: int) -> list[int]:
    """Prompts that often begin alike, so that the prefix cache has something to find."""
    stem = [random.choice((1, 2)) for _ in range(random.choice((0, 4, 12)))]
    return (stem + [random.randrange(VOCAB) for _ in range(random.randint(1, longest))])[:longest]
