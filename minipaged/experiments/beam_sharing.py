"""How much memory beams save by sharing KV blocks (PagedAttention, §6.3, Fig. 15b), on the embedded model."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from minipaged.config import SamplingParams
from minipaged.experiments.figures import bars
from minipaged.experiments.parallel_sampling import BlocksSaved
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.workloads import TraceRequest, alpaca_like, at_once, sharegpt_like, trace

if TYPE_CHECKING:
    from minipaged.llm import LLM

WIDTHS = (2, 4, 6)
PAPER = {"Alpaca-like": "37.6–55.2", "ShareGPT-like": "44.3–66.3"}
WHY = (
    "which beams survive depends on the model: ours is a small one that writes its own stories, the paper's is OPT-13B"
)
LONGEST = 1000  # tokens; slightly less than the embedded model's longest sequence


def measure(quick: bool, progress: Progress) -> Result:
    """Blocks saved by beam searches, and by parallel samples of the same requests."""
    from minipaged.llm import LLM

    llm = LLM("tiny", num_blocks=1024, max_num_seqs=48, enable_prefix_caching=False)
    counts = (6, 2) if quick else (20, 6)
    workloads = {"Alpaca-like": (alpaca_like, counts[0]), "ShareGPT-like": (sharegpt_like, counts[1])}
    percent: dict[str, list[float]] = {}
    rows = []
    for name, (lengths, count) in workloads.items():
        requests = [r for r in trace(lengths(0), at_once(2 * count)) if r.num_prompt + r.num_output < LONGEST][:count]
        for kind in ("beams", "samples"):
            for width in WIDTHS:
                progress(sum(map(len, percent.values())) / 12, f"{name}, {width} {kind}")
                value = saved(llm, requests, width, kind == "beams")
                percent.setdefault(f"{name}, {kind}", []).append(value)
                paper = (PAPER[name], READ, WHY) if kind == "beams" else (None, None, "")
                rows.append(Row(f"{name}, {width} {kind}", value, "%", paper[0], paper[1], why=paper[2]))
    figure = bars("Blocks saved by sharing", WIDTHS, percent, "saved, % of blocks")
    assumed = [f"The embedded model tells stories from prompts of the drawn lengths; both together below {LONGEST}."]
    return Result(rows, figure, assumed, {"saved": percent})


def saved(llm: LLM, requests: list[TraceRequest], width: int, beams: bool) -> float:
    """Percent of blocks saved by these requests as beam searches of ``width``, or as ``width`` parallel samples."""
    engine = llm.engine
    for index, request in enumerate(requests):
        prompt = _story(llm, index, request.num_prompt)
        kind: dict[str, Any] = {"beam_width": width, "temperature": 0} if beams else {"n": width}
        params = SamplingParams(max_tokens=request.num_output, ignore_eos=True, seed=index, **kind)
        engine.add_request(str(index), prompt, params)
    blocks = BlocksSaved()
    while engine.has_unfinished():
        engine.step()
        blocks(engine)
    return blocks.percent


def _story(llm: LLM, seed: int, num_tokens: int) -> list[int]:
    """A prompt of ``num_tokens`` tokens from stories like the model's training data."""
    from minipaged.tiny.stories import story

    rng, tokens = Random(seed), list[int]()
    while len(tokens) < num_tokens:
        tokens += llm.encode(story(rng).text)
    return tokens[:num_tokens]
