"""A model without torch, for fuzzing everything between the front door and the tensors.

KV is a dict from slot to (position, token). The next token is a hash of the context *as read through the block table*,
so one wrong, stale or missing slot changes every token after it.
"""

from __future__ import annotations

from random import Random
from zlib import crc32

from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.scheduling.plan import Chunk, SampledToken, StepPlan

VOCAB = 50
EOS = 7


def next_token(context: list[int], branch: int) -> int:
    return crc32(repr((context, branch)).encode()) % VOCAB


def unbatched(prompt: list[int], params: SamplingParams, branch: int, max_len: int) -> list[int]:
    """What a loop over one sequence gives: the truth that every schedule must reproduce."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens, branch))
        ended = tokens[-1] == EOS and not params.ignore_eos
        if ended or len(tokens) - len(prompt) == params.max_tokens or len(tokens) >= max_len:
            return tokens[len(prompt) :]


class FakeRunner:
    """Executes plans on the dict, in the order the real runner has: copies, then writes, then reads."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, tuple[int, int]] = {}

    def execute(self, plan: StepPlan) -> list[list[int]]:
        size = self.block_size
        moved = {
            copy.dst * size + i: self.slots.get(copy.src * size + i) for copy in plan.copies for i in range(size)
        }
        assert len(moved) == size * len(plan.copies), "two copies into one block"
        self.slots.update({slot: value for slot, value in moved.items() if value is not None})
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, start=chunk.start):
                self.slots[self._slot(chunk, position)] = (position, token)
        return [self._read(chunk) for chunk in plan.chunks]

    def _slot(self, chunk: Chunk, position: int) -> int:
        return chunk.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _read(self, chunk: Chunk) -> list[int]:
        values = [self.slots[self._slot(chunk, position)] for position in range(chunk.start + chunk.num_tokens)]
        assert [position for position, _ in values] == list(range(len(values))), "a slot holds another position"
        return [token for _, token in values]


def fake_sampler(contexts: list[list[int]], plan: StepPlan) -> list[SampledToken]:
    return [
        SampledToken(next_token(context, chunk.request.seqs.index(seq)))
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
