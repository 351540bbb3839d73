"""The strongest test: random traces on pools far too small, invariants after every step, tokens as if alone."""

from random import Random

import pytest

from minipaged.config import SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.events import State
from tests.fake import fake_engine, random_prompt, unbatched

TRACES = 2000


def run_trace(seed: int) -> dict[str, int]:
    """One random engine, some random requests arriving over time. Returns how often the rare things happened."""
    random = Random(seed)
    block_size = random.randint(1, 24)
    num_blocks = random.randint(3, 16) if block_size > 2 else random.randint(12, 40)
    max_num_seqs = random.randint(1, 6)
    engine = fake_engine(
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + random.randint(0, 20),
        max_model_len=random.randint(20, 120),
        enable_prefix_caching=random.random() < 0.7,
    )
    state = State()
    state.apply(engine.started_event())
    seen: dict[str, int] = {}

    def listen(event):
        state.apply(event)
        seen[event.type] = seen.get(event.type, 0) + 1

    engine.events.subscribe(listen)
    asked, done = {}, {}
    arrivals = sorted(random.randint(0, 25) for _ in range(random.randint(1, 7)))
    steps = 0
    while arrivals or engine.has_unfinished():
        while arrivals and arrivals[0] <= steps:
            arrivals.pop(0)
            request_id = f"r{len(asked) + seen.get('refused', 0)}"
            params = SamplingParams(
                n=random.choice((1, 1, 1, 2, 3)), max_tokens=random.randint(1, 40), ignore_eos=random.random() < 0.5
            )
            prompt = random_prompt(random, 30)
            try:
                engine.add_request(request_id, prompt, params)
                asked[request_id] = (prompt, params)
            except InvalidRequest:
                seen["refused"] = seen.get("refused", 0) + 1
        if asked and random.random() < 0.02:
            victim = random.choice(list(asked))
            output = engine.abort(victim)
            if output:
                done[victim] = output
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.check()
        tables = {seq_id: seq.table for seq_id, seq in state.seqs.items() if seq.table}
        assert tables == engine.block_tables()
        assert state.ref_counts == engine.memory.pool.ref_counts
        steps += 1
        assert steps < 5000, "no progress"
    assert engine.memory.pool.num_free == num_blocks and not engine.memory.tables
    assert done.keys() == asked.keys()
    for request_id, (prompt, params) in asked.items():
        for out in done[request_id].outputs:
            truth = unbatched(prompt, params, out.index, engine.max_model_len)
            assert out.token_ids == truth[: len(out.token_ids)], f"{request_id}, sequence {out.index}"
            if len(out.token_ids) < len(truth):
                cut = "aborted" if out.finish_reason == "abort" else "outgrown"
                assert out.finish_reason == ("abort" if cut == "aborted" else "length")
                seen[cut] = seen.get(cut, 0) + 1
    return seen


@pytest.mark.parametrize("part", range(4))
def test_random_traces_give_the_tokens_of_an_unbatched_loop(part):
    totals: dict[str, int] = {}
    for seed in range(part * TRACES // 4, (part + 1) * TRACES // 4):
        try:
            seen = run_trace(seed)
        except Exception as error:
            error.add_note(f"trace {seed}")
            raise
        for name, times in seen.items():
            totals[name] = totals.get(name, 0) + times
    # A fuzz that never meets the hard cases proves nothing.
    for rare in ("preempted", "copied", "forked", "shared", "cached", "evicted", "aborted", "outgrown", "refused"):
        assert totals[rare] > 20, f"{rare} happened {totals.get(rare, 0)} times in {TRACES // 4} traces"
