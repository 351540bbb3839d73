"""Hit rates of eviction policies: without predictions, with perfect knowledge, and with wrong predictions."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

from minipaged.core.engine import Engine
from minipaged.core.plan import StepPlan
from minipaged.core.pool import BlockPool
from minipaged.core.prefix_cache import EMPTY_PREFIX, PrefixCache
from minipaged.events import EventLog
from minipaged.experiments.figures import lines
from minipaged.experiments.result import Progress, Result, Row
from minipaged.experiments.simulator import OPT_13B, VOCAB, simulate
from minipaged.features.eviction.policies import (
    FIFO,
    LRU,
    Belady,
    FlushWhenAll0,
    LeafFirst,
    Mark0,
    MarkAndPredict,
    Marker,
)
from minipaged.features.eviction.prediction import Given, LastTurn, Predictor, discard_bits, flipped, phase_bits
from minipaged.workloads import TraceRequest, poisson, sharegpt_like

K = 50  # pages that fit into the cache
PAGES, SKEW, SCANS = 300, 0.9, 0.3
LOOP = 60
RATES = (0, 0.05, 0.1, 0.2, 0.4, 0.7, 1)
CHAT: dict[str, Any] = {"memory": "paged", "enable_prefix_caching": True, "max_model_len": 4096}
MakePolicy = Callable[[Seq[bool]], LeafFirst]
DISCARD: dict[str, MakePolicy] = {
    "FlushWhenAll0": lambda bits: FlushWhenAll0(Given(bits)),
    "Mark0": lambda bits: Mark0(Given(bits)),
}
PHASE: dict[str, MakePolicy] = {"Mark&Predict": lambda bits: MarkAndPredict(Given(bits))}
THINKING, READING = 20.0, 0.04  # seconds: mean pause before a turn, and per token of the previous answer
GOODBYE, FALSE_GOODBYE = 0.6, 0.03  # fractions of last turns and of other turns


def measure(quick: bool, progress: Progress) -> Result:
    """Hit rates on pages and in chats, and by the fraction of wrong bits, separately for wrong 0s and wrong 1s."""
    number = 2_000 if quick else 20_000
    requests = zipf_with_scans(number)
    progress(0, "pages")
    hits = {name: hit_percent(requests, policy) for name, policy in without_predictions(requests).items()}
    loop = [number % LOOP for number in range(40 * LOOP)]
    looped = {name: hit_percent(loop, policy) for name, policy in without_predictions(loop).items()}
    for policies, bits, in_loop in (
        (DISCARD, discard_bits(requests, K), discard_bits(loop, K)),
        (PHASE, phase_bits(requests, K), phase_bits(loop, K)),
    ):
        for name, make in policies.items():
            for wrong in (0, 0.1, 1):
                hits[f"{name}, {wrong:.0%} wrong"] = hit_percent(requests, make(flipped(bits, wrong, wrong)))
            looped[name] = hit_percent(loop, make(in_loop))
    curves = sweep(requests, progress)
    chats = chat_hits(quick, progress)
    rows = [Row(f"Zipf and scans: {name}", value, "% hits") for name, value in hits.items()]
    rows += [Row(f"a loop: {name}", value, "% hits") for name, value in looped.items()]
    rows += [Row(f"chats: {name}", value, "% of prompt tokens found") for name, value in chats.items()]
    axes = "part of the bits of this kind that are wrong", "hits, %"
    figure = lines("Hits on Zipf and scans by wrong bits", curves, *axes)
    return Result(rows, figure, assumed(number), {"sweep": curves, "pages": hits, "loop": looped, "chats": chats})


def assumed(number: int) -> list[str]:
    return [
        f"{number:,} requests, room for {K} pages: {1 - SCANS:.0%} for one of {PAGES} pages by Zipf's law "
        f"({SKEW:g}), {SCANS:.0%} in scans of {K} pages that never come again. The loop goes round {LOOP} pages. Bits "
        "are right but for a part of them, drawn at random.",
        "FlushWhenAll0 empties the cache only as blocks are needed; until then what they held can still be found.",
        OPT_13B.stated(),
        f"Chats begin at random, one in 4 s, with ShareGPT-like lengths. 30 % have one turn; others have 2, and with "
        f"probability 2/3 each another. Users take {1000 * READING:g} ms for each token of "
        f"an answer, then {THINKING:g} s in the mean (exponential), and say goodbye in "
        f"{GOODBYE:.0%} of last turns and {FALSE_GOODBYE:.0%} of others: that is what a predictor can see.",
        "Belady on the engine gives up the leaf that is needed latest; with prefixes that form trees, and "
        "sequences that take blocks from the cache, that need not be the best there is. LRU and FIFO come to the "
        "same in chats: what they evict are the ends of conversations, which are used just when they are computed.",
    ]


# --- hits on pages ---


def zipf_with_scans(number: int, seed: int = 0) -> list[int]:
    """A sequence of requested page numbers; pages of scans are negative and unique."""
    rng = Random(f"zipf/{seed}")
    weights = list(accumulate(1 / rank**SKEW for rank in range(1, PAGES + 1)))
    requests: list[int] = []
    scanned = 0
    while len(requests) < number:
        if rng.random() < SCANS / (SCANS + (1 - SCANS) * K):
            requests += range(-scanned - 1, -scanned - 1 - K, -1)
            scanned += K
        else:
            requests.append(bisect(weights, rng.random() * weights[-1]))
    return requests[:number]


def without_predictions(requests: Seq[int]) -> dict[str, LRU]:
    belady = Belady([(page, 0) for page in requests], block_size=1)
    return {"LRU": LRU(), "FIFO": FIFO(), "Marker": Marker(), "Belady": belady}


def hit_percent(requests: Seq[int], policy: LRU) -> float:
    """Hit rate of page requests on the real prefix cache of K blocks; a page is one block, freed at once."""
    cache = PrefixCache(EventLog(), policy)
    pool, hits = BlockPool(K, cache), 0
    for number, page in enumerate(requests):
        if isinstance(policy, Belady):
            policy.admitted(str(number))
        found = cache.lookup(EMPTY_PREFIX, (page,))
        if found:
            hits, block = hits + 1, found.block
            pool.share(block)
        else:
            block = pool.allocate()
            cache.insert(EMPTY_PREFIX, (page,), block)
        if isinstance(policy, LeafFirst) and policy.predict is not None:
            policy.note([block], policy.predict((page,)))
        pool.free(block)
    return 100 * hits / len(requests)


def sweep(requests: Seq[int], progress: Progress) -> dict[str, tuple[Seq[float], Seq[float]]]:
    """Hit rates by the fraction of wrong 1s, with all 0s right, and by the fraction of wrong 0s, with all 1s right."""
    curves: dict[str, tuple[Seq[float], Seq[float]]] = {}
    for policies, bits in ((DISCARD, discard_bits(requests, K)), (PHASE, phase_bits(requests, K))):
        for name, make in policies.items():
            progress(0.1 + 0.1 * len(curves), name)
            # η₀ counts wrong predictions of 0, which are 1s that were flipped.
            zeros = [hit_percent(requests, make(flipped(bits, 0, rate))) for rate in RATES]
            ones = [hit_percent(requests, make(flipped(bits, rate, 0))) for rate in RATES]
            curves |= {f"{name}, 1s that became 0": (RATES, zeros), f"{name}, 0s that became 1": (RATES, ones)}
    return curves


# --- hits in chats, on the engine ---


@dataclass
class Chats:
    """Conversations as a trace of turns. ``last`` and ``goodbye`` hold the last four tokens of such turns' prompts."""

    requests: list[TraceRequest] = field(default_factory=list)
    last: set[tuple[int, ...]] = field(default_factory=set)
    goodbye: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, request: TraceRequest, last: bool, goodbye: bool) -> None:
        end = _end(request.token_ids(VOCAB))
        self.requests.append(request)
        self.last |= {end} if last else set()
        self.goodbye |= {end} if goodbye else set()

    def is_last(self, tokens: Seq[int]) -> bool:
        return _end(tokens) in self.last

    def says_goodbye(self, tokens: Seq[int]) -> bool:
        return _end(tokens) in self.goodbye


def _end(tokens: Seq[int]) -> tuple[int, ...]:
    return tuple(tokens[-4:])


def conversations(seconds: float, seed: int = 0) -> Chats:
    rng, lengths, chats = Random(f"chats/{seed}"), sharegpt_like(seed), Chats()
    for stream, begin in enumerate(poisson(0.25, seconds, seed=seed)):
        turns = 1 if rng.random() < 0.3 else 2
        while turns > 1 and rng.random() < 2 / 3:
            turns += 1
        said, now = 0, begin
        for turn in range(1, turns + 1):
            question, answer = next(lengths)
            if said + question + answer > CHAT["max_model_len"]:
                break
            goodbye = rng.random() < (GOODBYE if turn == turns else FALSE_GOODBYE)
            chats.add(TraceRequest(now, said + question, answer, stream=stream), turn == turns, goodbye)
            said += question + answer
            now += answer * READING + rng.expovariate(1 / THINKING)
    chats.requests.sort(key=lambda request: request.arrival)
    return chats


def chat_policies(chats: Chats) -> dict[str, LRU]:
    """Policies without predictions, and with a predictor that knows the last turns or guesses them."""
    prompts = [request.token_ids(VOCAB) for request in chats.requests]
    policies: dict[str, LRU] = {"LRU": LRU(), "FIFO": FIFO(), "Marker": Marker(), "Belady": Belady(prompts, 16)}
    predictors: dict[str, Callable[[], Predictor]] = {
        "guessed": lambda: LastTurn(chats.says_goodbye),
        "known": lambda: chats.is_last,
    }
    for how, make in predictors.items():
        policies[f"FlushWhenAll0, last turn {how}"] = FlushWhenAll0(make())
        policies[f"Mark0, last turn {how}"] = Mark0(make())
        policies[f"Mark&Predict, last turn {how}"] = MarkAndPredict(make())
    return policies


def chat_hits(quick: bool, progress: Progress) -> dict[str, float]:
    """Percent of prompt tokens found in the prefix cache, by policy."""
    chats = conversations(200 if quick else 1200)
    found: dict[str, float] = {}
    policies = chat_policies(chats)
    for name, policy in policies.items():
        progress(0.7 + 0.3 * len(found) / len(policies), f"chats, {name}")
        found[name] = found_percent(chats, policy)
    return found


def found_percent(chats: Chats, policy: LRU, **settings: Any) -> float:
    """Percent of prompt tokens found when the engine serves the chats. ``settings``: fields of `EngineConfig`."""
    computed = 0

    def look(engine: Engine, plan: StepPlan) -> None:
        nonlocal computed
        for chunk in plan.chunks:
            computed += max(0, min(chunk.start + chunk.num_tokens, chunk.seq.num_prompt) - chunk.start)
            if isinstance(policy, Belady):
                policy.admitted(chunk.request.request_id)

    simulate(chats.requests, watch=look, eviction_policy=lambda: policy, **CHAT | settings)
    return 100 * (1 - computed / sum(request.num_prompt for request in chats.requests))
