"""The strongest test: random traces on pools far too small, invariants after every step, tokens as if alone."""

from collections import Counter
from random import Random

import pytest
import torch

from minipaged.config import EVICTIONS, SamplingParams
from minipaged.core.plan import Chunk, SampledToken, StepPlan
from minipaged.core.request import Request, Sequence
from minipaged.core.seams import Sampling
from minipaged.errors import InvalidConfig, InvalidRequest, RequestFailed
from minipaged.events import State
from minipaged.events.waste import AHEAD
from minipaged.features.batchllm.groups import BatchItem
from minipaged.features.full_sampler import FullSampler
from minipaged.features.speculative.drafts import speculation_of
from tests.fake import (
    fake_engine,
    guess_at_random,
    random_prompt,
    running_groups,
    swap_of,
    unbatched,
    unbatched_beams,
)

TRACES = 10_000
PARTS = 5


def random_engine(random: Random, everything: bool):
    """With ``everything``: swapping, speculation and groups at once, in blocks small enough to share."""
    block_size = random.randint(1, 4 if everything else 24)
    max_num_seqs = random.randint(2, 6)
    if everything:
        settings = {"preemption": "swap", "swap_blocks": random.randint(4, 30)}
        slots = random.randint(36, 90)
    elif random.random() < 0.3:  # contiguous memory needs more of it
        settings = {"memory": random.choice(AHEAD)}
        slots = random.randint(48, 240)
    else:
        settings = {"enable_prefix_caching": random.random() < 0.7}
        if random.random() < 0.5:
            settings |= {"preemption": "swap", "swap_blocks": random.randint(1, 30)}
        if settings["enable_prefix_caching"] and random.random() < 0.2:
            settings["eviction"] = random.choice(EVICTIONS)
        slots = random.randint(24, 90)
    if everything or random.random() < 0.3:
        settings |= {"speculate": "prompt-lookup", "num_speculative_tokens": random.randint(1, 7)}
    engine = fake_engine(
        block_size=block_size,
        num_blocks=max(3, slots // block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + random.randint(0, 20),
        max_model_len=random.randint(20, 120),
        batching="static" if not everything and random.random() < 0.15 else "continuous",
        **settings,
    )
    if speculation_of(engine):
        guess_at_random(engine, random, right=random.choice((0.0, 0.6, 0.9, 1.0)))
    return engine


def random_params(random: Random) -> SamplingParams:
    length = {"max_tokens": random.randint(1, 24), "ignore_eos": random.random() < 0.5}
    if random.random() < 0.25:
        width = random.randint(1, 4)
        return SamplingParams(
            temperature=0,
            beam_width=width,
            n=random.randint(1, width),
            length_penalty=random.choice((0.0, 1.0, 2.0)),
            early_stopping=random.choice((True, False, "never")),
            **length,
        )
    return SamplingParams(n=random.choice((1, 1, 1, 2, 3)), **length)


def not_empty(tables: dict[int, list[int]]) -> dict[int, list[int]]:
    return {seq_id: table for seq_id, table in tables.items() if table}


class Trace:
    """One random engine and random requests that arrive over time, are forked and aborted."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.everything = self.random.random() < 0.2
        self.engine = random_engine(self.random, self.everything)
        self.state = State()
        self.state.apply(self.engine.started_event())
        self.seen: Counter[str] = Counter()
        self.engine.events.subscribe(self.listen)
        self.asked: dict[str, tuple] = {}
        self.done: dict = {}
        self.cut: set[str] = set()  # ended early: aborted, or too large for the pool
        outgrow = self.engine.scheduler.outgrow

        def watched(request, plan):
            before = len(request.live)
            outgrow(request, plan)
            if len(request.live) < before:  # else a stage gave up blocks that it kept for others
                self.cut.add(request.request_id)
                self.seen["outgrown"] += 1
            else:
                self.seen["reclaimed"] += 1

        self.engine.scheduler.outgrow = watched
        self.failing: set[str] = set()
        if self.random.random() < 0.2:
            self.engine.sampler = self.failing_sampler(self.engine.sampler)

    def failing_sampler(self, sample):
        """Sometimes finds nothing to draw for one row, also of a draft, of several samples, or of a beam."""

        def sampler(logits, plan):
            sampled = sample(logits, plan)
            rows = [row for row, token in enumerate(sampled) if token is not None]
            if rows and self.random.random() < 0.05:
                row = self.random.choice(rows)
                sampled[row] = SampledToken(-1, error=RequestFailed("nothing can be drawn"))
                self.failing.add(plan.samples[row][0].request_id)
            return sampled

        return sampler

    def listen(self, event):
        self.state.apply(event)
        self.seen[event.type] += 1
        if event.type == "speculated":
            rejected = event.proposed - event.accepted
            self.seen.update({"accepted": event.accepted, "rejected": rejected, "taken back": len(event.blocks)})

    def run(self, max_steps: int = 5000) -> Counter[str]:
        arrivals = sorted(self.random.randint(0, 10) for _ in range(self.random.randint(2, 5)))
        if self.everything or self.random.random() < 0.1:
            self.arrive_in_groups()
        for step in range(max_steps):
            while arrivals and (arrivals[0] <= step or not self.engine.has_unfinished()):  # no time passes idly
                arrivals.pop(0)
                self.arrive()
            if self.asked and self.random.random() < 0.04:
                self.disturb()
            ran, admitted = len(self.engine.scheduler.running), self.seen["admitted"]
            for output in self.engine.step():
                if output.finished:
                    self.done[output.request_id] = output
                    if output.error is not None:
                        assert output.request_id in self.failing
                        self.cut.add(output.request_id)
                        self.seen["failed"] += 1
            self.check_step()
            if self.engine.config.batching == "static" and ran:
                assert self.seen["admitted"] == admitted, "a request joined a static batch"
            if not arrivals and not self.engine.has_unfinished():
                self.check_end()
                return self.seen
        raise AssertionError("no progress")

    def arrive(self) -> None:
        request_id, prompt = f"r{len(self.asked) + self.seen['refused']}", random_prompt(self.random, 20)
        if self.asked and self.random.random() < 0.25:
            prompt, _, _ = self.random.choice(list(self.asked.values()))  # the cache may know all of it
        params = random_params(self.random)
        try:
            self.engine.add_request(request_id, prompt, params)
            self.asked[request_id] = (prompt, params, ())
        except InvalidRequest:
            self.seen["refused"] += 1

    def arrive_in_groups(self) -> None:
        """A batch of requests that begin alike, where the engine can share what they begin with."""
        stem = random_prompt(self.random, 14)
        items = [
            BatchItem(f"batch-{i}", stem + random_prompt(self.random, 4), random_params(self.random))
            for i in range(self.random.randint(2, 6))
        ]
        try:
            self.engine.add_batch(items)
        except InvalidRequest:
            self.seen["refused"] += 1
        except InvalidConfig:
            self.seen["batches refused"] += 1
        else:
            self.asked |= {item.request_id: (item.prompt_token_ids, item.params, ()) for item in items}

    def disturb(self) -> None:
        victim = self.random.choice(list(self.asked))
        if self.random.random() < 0.5:
            output = self.engine.abort(victim)
            if output:
                self.done[victim] = output
                self.cut.add(victim)
                self.seen["aborted"] += 1
            return
        try:
            child = self.engine.fork(victim, f"{victim}/{len(self.asked)}")
        except InvalidRequest:
            return
        (seq,) = self.engine.scheduler.running[-1].seqs
        prompt, params, _ = self.asked[victim]
        self.asked[child] = (prompt, params, tuple(seq.output_tokens))
        self.seen["forked by hand"] += 1

    def check_step(self) -> None:
        engine, seqs = self.engine, self.state.seqs
        engine.check()
        held = engine.held()
        assert min(held) >= 0 and held.total <= engine.num_blocks * engine.config.block_size
        # Of a static batch some may wait for their first tokens, with a table that is empty.
        assert {i: seq.table for i, seq in seqs.items() if seq.table} == not_empty(engine.block_tables())
        assert {i: seq.swap_table for i, seq in seqs.items() if seq.swap_table} == not_empty(
            swap_of(engine).space.tables
        )
        assert self.state.ref_counts == engine.memory.pool.ref_counts
        assert self.state.swap_ref_counts == swap_of(engine).space.pool.ref_counts
        scheduler = engine.scheduler
        for seq in (seq for request in scheduler.running for seq in request.live):
            assert (seqs[seq.seq_id].tokens, seqs[seq.seq_id].num_computed) == (seq.tokens, seq.num_computed)
        queues = {"waiting": scheduler.waiting, "running": scheduler.running, "swapped": swap_of(engine).requests_out}
        for name, queue in queues.items():
            assert getattr(self.state, name) == [r.request_id for r in queue], name

    def check_end(self) -> None:
        memory = self.engine.memory
        assert memory.pool.num_free == memory.pool.num_blocks and not memory.tables
        space = swap_of(self.engine).space
        assert space.pool.num_free == space.pool.num_blocks and not space.tables
        assert self.done.keys() == self.asked.keys()
        if self.engine.config.memory in AHEAD:
            assert not self.seen["preempted"] and not self.seen["outgrown"], "all was set aside at admission"
            self.seen.update({f"{self.engine.config.memory} copied": self.seen["copied"]})
        assert not running_groups(self.engine).group_of and not self.state.groups
        self.seen.update([self.engine.config.memory, self.engine.config.batching])
        for request_id, (prompt, params, inherited) in self.asked.items():
            outputs = self.done[request_id].outputs
            whole = request_id not in self.cut
            if params.beam_width:
                self.seen["searched"] += whole
                if whole:
                    truth = unbatched_beams(prompt, params, self.engine.max_model_len)
                    assert [out.token_ids for out in outputs] == truth, request_id
                continue
            for out in outputs:
                truth = unbatched(prompt, params, out.index, self.engine.max_model_len, inherited)
                told = self.state.seqs[self.state.requests[request_id][out.index]].tokens
                assert told == prompt + out.token_ids, f"{request_id}: told once, kept for ever"
                assert out.token_ids == (truth if whole else truth[: len(out.token_ids)]), request_id
        wings = {
            "swap": self.seen["swapped_out"],
            "beams": self.seen["searched"],
            "drafts": self.seen["speculated"],
            "groups": self.seen["prefix_kept"],
        }
        self.seen["all wings at once"] += all(wings.values())


@pytest.mark.parametrize("part", range(PARTS))
def test_random_traces_give_the_tokens_of_an_unbatched_loop(part):
    totals: Counter[str] = Counter()
    for seed in range(part * TRACES // PARTS, (part + 1) * TRACES // PARTS):
        try:
            totals += Trace(seed).run()
        except Exception as error:
            error.add_note(f"trace {seed}")
            raise
    # A fuzz that never meets the hard cases proves nothing.
    rare = ["preempted", "swapped_out", "swapped_in", "resumed", "copied", "forked", "shared", "cached", "evicted"]
    rare += ["aborted", "failed", "outgrown", "refused", "searched", "forked by hand", "static"]
    rare += ["accepted", "rejected", "taken back", "predicted"]
    rare += ["prefix_kept", "prefix_released", "batches refused"]
    rare += [*AHEAD, *(f"{manager} copied" for manager in AHEAD)]
    assert not [name for name in rare if totals[name] < 20], totals
    assert totals["all wings at once"] and totals["reclaimed"], totals


# --- masks --------------------------------------------------------------------------------------------------------

FEW = 6  # tokens, so that random masks often forbid them all
ENDS = frozenset({1, 2})


def random_masks(random: Random) -> SamplingParams:
    """Parameters that forbid tokens, in every combination."""

    def some() -> list[int]:
        return random.sample(range(FEW), random.randint(0, FEW))

    biases = {token: random.choice((-1e9, -100, -99, 0.5, 100)) for token in some()}
    return SamplingParams(
        temperature=random.choice((0, 1e-30, 0.7, 1, 100)),
        top_k=random.choice((0, 1, 3, 10**9)),
        top_p=random.choice((1, 0.5, 1e-9)),
        min_p=random.choice((0, 0.3, 1)),
        repetition_penalty=random.choice((1, 0.01, 1.3, 100)),
        presence_penalty=random.choice((0, -100, 100)),
        frequency_penalty=random.choice((0, 2, -2)),
        logit_bias=biases if random.random() < 0.7 else {},
        min_tokens=random.choice((0, 0, 3)),
        stop_token_ids=some(),
        ignore_eos=random.random() < 0.3,
        logprobs=random.choice((None, 0, 3)),
    )


def possible(row: list[float], params: SamplingParams, num_output: int) -> set[int]:
    """The tokens that these parameters allow, by their definition."""
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else ENDS)
    forbidden = ends if num_output < params.min_tokens else set()
    return {token for token, logit in enumerate(row) if logit > -float("inf")} - forbidden


def test_every_combination_of_masks_leaves_a_token_or_fails_alone():
    random, seen, door = Random(0), Counter(), FullSampler(FEW, ENDS)
    for _ in range(300):
        rows, plan, allowed = [], StepPlan(0), []
        while len(rows) < 4:
            params = random_masks(random)
            try:
                door.check(params)
            except InvalidRequest:
                seen["refused"] += 1
                banned = {token for token, bias in params.logit_bias.items() if bias <= -100}
                assert possible([0.0] * FEW, params, 0) <= banned, "a token was left"
                continue
            output = [random.randrange(FEW) for _ in range(random.choice((0, 1, 5)))]
            row = [random.choice((-float("inf"), random.gauss(0, 3))) for _ in range(FEW)]
            seq = Sequence(len(rows), [0, *output], 1, Random(len(rows)))
            ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else ENDS)
            request = Request(str(len(rows)), [0], params, [seq], ends, 99, 0, Sampling(params, frozenset()))
            plan.chunks.append(Chunk(request, seq, len(output), 1, [seq], [0]))
            allowed.append(possible(row, params, len(output)))
            rows.append(row)
        for token, some in zip(door(torch.tensor(rows), plan), allowed, strict=True):
            assert (token.error is None) == bool(some)
            assert token.error is not None or token.token_id in some
            seen["failed" if token.error else "drawn"] += 1
    assert min(seen.values()) > 30 and len(seen) == 3, seen
