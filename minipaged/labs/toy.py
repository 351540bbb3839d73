"""The real engine on a model without tensors: checks run it a thousand times faster than on a network.

KV is (position, token). The next token is a hash of the context *as read through the block table*, so one wrong, stale
or missing slot changes every token after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from random import Random
from typing import Any
from zlib import crc32

from minipaged.build import assemble, make_manager
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.core.plan import Chunk, SampledToken, StepPlan
from minipaged.core.scheduler import Scheduler
from minipaged.labs.checking import Tape
from minipaged.labs.student import Violation

VOCAB = 50
MAX_STEPS = 1000


def next_token(context: Iterable[int], branch: int = 0) -> int:
    """What the toy model says after ``context``, to the request's sample number ``branch``."""
    return crc32(bytes((*context, VOCAB + branch))) % VOCAB


def alone(prompt: list[int], num_output: int, branch: int = 0) -> list[int]:
    """The output of a loop over one sequence without any engine: what every schedule and memory must reproduce."""
    tokens = list(prompt)
    for _ in range(num_output):
        tokens.append(next_token(tokens, branch))
    return tokens[len(prompt) :]


class ToyRunner:
    """Executes plans on lists, in the real runner's order: swap-out, swap-in, copy, write, read."""

    def __init__(self, block_size: int, num_blocks: int, swap_blocks: int = 0) -> None:
        self.block_size = block_size
        self.blocks: list[list[Any]] = [[None] * block_size for _ in range(num_blocks)]
        self.swap: list[list[Any]] = [[None] * block_size for _ in range(swap_blocks)]

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
        for block, content in [(copy.dst, list(source[copy.src])) for copy in copies]:  # all are read before any write
            target[block] = content

    def _read(self, chunk: Chunk) -> tuple[int, ...]:
        """The context's tokens; −1 counts for a slot that is empty or holds another position's token."""
        end = chunk.start + chunk.num_tokens
        slots = list(chain.from_iterable(self.blocks[block] for block in chunk.block_table))[:end]
        return tuple(slot[1] if slot and slot[0] == i else VOCAB - 1 for i, slot in enumerate(slots))


def toy_sampler(contexts: list[tuple[int, ...]], plan: StepPlan) -> list[SampledToken]:
    return [
        SampledToken(next_token(context, chunk.request.seqs.index(seq)))
        for context, chunk in zip(contexts, plan.chunks, strict=True)
        for seq in chunk.samples
    ]


def toy_engine(
    make_memory: Callable[..., Any] = make_manager, make_scheduler: Callable[..., Any] = Scheduler, **settings: Any
) -> Engine:
    """An engine on the toy model. ``settings`` are fields of `EngineConfig`."""
    defaults = {"num_blocks": 16, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    config = EngineConfig(model="toy", **(defaults | {"max_model_len": 100, "enable_prefix_caching": False} | settings))
    assert config.num_blocks is not None and config.block_size is not None
    runner = ToyRunner(config.block_size, config.num_blocks, config.swap_space(config.num_blocks))
    return assemble(
        config, runner, toy_sampler, vocab_size=VOCAB, make_memory=make_memory, make_scheduler=make_scheduler
    )


def run(engine: Engine, later: Iterable[Callable[[], None]] = (), every: int = 0) -> dict[str, list[list[int]]]:
    """Steps until nothing is left: request → the output of each of its sequences. One of ``later`` happens after
    each ``every`` steps. `Violation` if the engine goes on and on."""
    done, todo = {}, list(later)
    for step in range(MAX_STEPS):
        if todo and (not engine.has_unfinished() or step % every == 0):
            todo.pop(0)()
        for output in engine.step():
            if output.finished:
                done[output.request_id] = [list(one.token_ids) for one in output.outputs]
        if not engine.has_unfinished() and not todo:
            return done
    raise Violation(f"the requests have not all ended after {MAX_STEPS} steps", "never done")


def requests(random: Random, number: int, longest: int, samples: int) -> list[tuple[list[int], int, int]]:
    """(prompt, output tokens, samples) of random requests. Prompts and outputs have ``longest`` tokens at most."""
    return [
        (
            [random.randrange(VOCAB) for _ in range(random.randint(1, longest))],
            random.randint(1, longest),
            random.randint(1, samples),
        )
        for _ in range(number)
    ]


def serve(engine: Engine, requests: Iterable[tuple[list[int], int, int]], tape: Tape, every: int = 0) -> None:
    """Lets the engine serve the requests, on tape: all at once, or one after each ``every`` steps. `Violation` if any
    gets other tokens than it gets alone, or if blocks are missing in the end."""
    config, seats = engine.config, engine.scheduler.max_num_seqs
    tape.say(
        f"an engine with {engine.num_blocks} blocks of {config.block_size} slots; a step computes at most {seats} "
        f"sequences and {engine.scheduler.max_num_batched_tokens} tokens"
    )
    tape.record(engine.started_event())
    engine.events.subscribe(tape.record)
    asked = {f"request-{number}": request for number, request in enumerate(requests)}

    def add(name: str, prompt: list[int], num_output: int, n: int) -> None:
        asks = f"{num_output} more" if n == 1 else f"{n} times {num_output} more"
        comes = f"{name} comes, with a prompt of length {len(prompt)}, to generate {asks}"
        tape.say(f"before step {engine.scheduler.step}: {comes}")
        engine.add_request(name, prompt, params(num_output, n))

    arrivals = [partial(add, name, *request) for name, request in asked.items()]
    if not every:
        while arrivals:
            arrivals.pop(0)()
    outputs = run(engine, arrivals, every)
    for name, (prompt, num_output, n) in asked.items():
        if outputs[name] != [alone(prompt, num_output, branch) for branch in range(n)]:
            raise Violation(f"{name} got other tokens than it gets alone", "other tokens")
    if engine.memory.pool.num_free != engine.num_blocks:
        raise Violation("all requests have ended, but not all blocks are free", "leak")


def params(max_tokens: int, n: int = 1) -> SamplingParams:
    """Ask for exactly so many tokens."""
    return SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True, seed=0)
