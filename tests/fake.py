"""A fake model without torch, for fuzzing the engine from its API down to the plan of a step.

KV is (position, token). The next token is a hash of the context *as read through the block table*, so one wrong, stale
or missing slot changes every token after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain, count
from random import Random
from zlib import crc32

from minipaged.build import assemble
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.core.plan import Chunk, SampledToken, StepPlan
from minipaged.core.request import Sequence
from minipaged.features.batchllm.groups import Groups
from minipaged.features.beam_search import BeamSearch
from minipaged.features.speculative.drafts import speculation_of
from minipaged.features.swap.swap_stage import Swap

VOCAB = 50
EOS = 7


def next_token(context: Iterable[int], branch: int) -> int:
    return crc32(bytes((*context, VOCAB + branch))) % VOCAB


def next_logprobs(context: Iterable[int]) -> dict[int, float]:
    """Distinct log-probabilities of the ten most likely tokens, for beam searches with up to five beams."""
    return _next_logprobs(bytes(context))


@lru_cache(maxsize=10_000)  # the engine and the expected result compute the same contexts
def _next_logprobs(context: bytes) -> dict[int, float]:
    random = Random(crc32(context))
    return {token: -rank / 3 - random.random() for rank, token in enumerate(random.sample(range(VOCAB), 10))}


def unbatched(prompt: list[int], params: SamplingParams, branch: int, max_len: int, output: tuple = ()) -> list[int]:
    """The output of a loop over one sequence, which every schedule must reproduce."""
    tokens = [*prompt, *output]
    while True:
        tokens.append(next_token(tokens, branch))
        ended = tokens[-1] == EOS and not params.ignore_eos
        if ended or len(tokens) - len(prompt) == params.max_tokens or len(tokens) >= max_len:
            return tokens[len(prompt) :]


def unbatched_beams(prompt: list[int], params: SamplingParams, max_len: int) -> list[list[int]]:
    """A beam search over plain lists, without blocks and forks; it reads each whole context again."""
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
    """Executes plans on lists, in the order of the real runner: swap-out, swap-in, copy, write, read."""

    def __init__(self, block_size: int, num_blocks: int, swap_blocks: int) -> None:
        self.block_size = block_size
        self.blocks: list[list] = [[None] * block_size for _ in range(num_blocks)]
        self.swap: list[list] = [[None] * block_size for _ in range(swap_blocks)]

    def execute(self, plan: StepPlan) -> list[tuple[int, ...]]:
        self._move(plan.swap_outs, self.blocks, self.swap)
        self._move(plan.swap_ins, self.swap, self.blocks)
        self._move(plan.copies, self.blocks, self.blocks)
        size = self.block_size
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, start=chunk.start):
                self.blocks[chunk.block_table[position // size]][position % size] = (position, token)
        return [self._read(chunk) for chunk in plan.chunks]

    def _move(self, copies: list, source: list, target: list) -> None:
        moved = {copy.dst: list(source[copy.src]) for copy in copies}  # all are read before any is written
        assert len(moved) == len(copies), "two copies into one block"
        for block, content in moved.items():
            target[block] = content

    def _read(self, chunk: Chunk) -> tuple[int, ...]:
        end = chunk.start + chunk.num_tokens
        values = list(chain.from_iterable(map(self.blocks.__getitem__, chunk.block_table)))[:end]
        positions, tokens = zip(*values, strict=True) if None not in values else ((), ())
        assert positions == tuple(range(end)), "a slot is empty or holds another position"
        return tokens


def fake_sampler(contexts: list[tuple[int, ...]], plan: StepPlan) -> list[SampledToken | None]:
    sampled: list[SampledToken | None] = []
    for context, chunk in zip(contexts, plan.chunks, strict=True):
        if chunk.draft:
            sampled += _checked(context, chunk)
        elif isinstance(chunk.request.decoding, BeamSearch):
            sampled += [_top(next_logprobs(context), chunk.request.decoding.num_logprobs) for _ in chunk.samples]
        else:
            sampled += [SampledToken(next_token(context, chunk.request.seqs.index(seq))) for seq in chunk.samples]
    return sampled


def _checked(context: tuple[int, ...], chunk: Chunk) -> list[SampledToken | None]:
    """The next token after each accepted part of the draft, up to its first mismatch; then ``None``."""
    branch, known = chunk.request.seqs.index(chunk.seq), len(context) - len(chunk.draft)
    said: list[SampledToken | None] = []
    for i in range(len(chunk.samples)):
        said.append(SampledToken(next_token(context[: known + i], branch)))
        if i < len(chunk.draft) and said[-1].token_id != context[known + i]:
            break
    return said + [None] * (len(chunk.samples) - len(said))


def fake_engine(**settings: object) -> Engine:
    """An engine on the fake model. ``settings`` are fields of EngineConfig."""
    defaults: dict = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    config = EngineConfig(model="fake", **(defaults | {"max_model_len": 200} | settings))
    swap_blocks = (config.swap_blocks or config.num_blocks) if config.preemption == "swap" else 0
    return assemble(
        config,
        FakeRunner(config.block_size, config.num_blocks, swap_blocks),
        fake_sampler,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )


def guess_at_random(engine: Engine, random: Random, right: float) -> None:
    """Makes a speculating engine draft tokens that are right with probability ``right``; prompt lookup finds none."""

    def propose(seq: Sequence, count: int) -> list[int]:
        requests = engine.scheduler.running
        branch = next(request.seqs.index(seq) for request in requests if seq in request.seqs)
        tokens = list(seq.tokens)
        for _ in range(random.randint(0, count)):
            tokens.append(next_token(tokens, branch) if random.random() < right else random.randrange(VOCAB))
        return tokens[len(seq.tokens) :]

    speculation_of(engine).propose = propose


def random_prompt(random: Random, longest: int) -> list[int]:
    """A random prompt, often with the same prefix as others, so that the prefix cache has hits."""
    stem = [random.choice((1, 2)) for _ in range(random.choice((0, 4, 12)))]
    return (stem + [random.randrange(VOCAB) for _ in range(random.randint(1, longest))])[:longest]


def swap_of(engine: Engine) -> Swap:
    """The engine's swap stage; an empty one if it does not swap."""
    for stage in engine.scheduler.stages:
        if isinstance(stage, Swap):
            return stage
    none = Swap(0)
    none.bind(engine.scheduler)
    return none


def running_groups(engine: Engine) -> Groups:
    """The engine's prefix groups; an empty stage before the first batch."""
    for stage in engine.scheduler.stages:
        if isinstance(stage, Groups):
            return stage
    return Groups(engine.scheduler.admission)
