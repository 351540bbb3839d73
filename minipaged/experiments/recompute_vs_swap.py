"""Recovering preempted requests: recompute their KV, or swap it back in (PagedAttention, §7.3, Fig. 19)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.experiments.figures import lines
from minipaged.experiments.result import READ, Progress, Result, Row
from minipaged.experiments.simulator import OPT_13B, simulate
from minipaged.experiments.timing import compare, ratio
from minipaged.workloads import poisson, sharegpt_like, trace

SIZES = (4, 16, 64, 256)
RATE, TOKENS = 3.0, 256
PAPER = {4: "> 1", 16: "≈ 1", 64: "≈ 1", 256: "< 1"}  # the paper's words: recompute wins for small blocks, then swap
WHY_SIMULATED = "small blocks pay for many small transfers, as in the paper; how much is an assumption of the clock"
WHY_MEASURED = (
    "here both sides are this device: swapping copies within its memory and makes no small transfers, recomputing runs "
    "a small model"
)


def measure(quick: bool, progress: Progress) -> Result:
    """Normalized latency of both on the simulated clock, and the real time of one preemption on this device."""
    latency: dict[str, list[float]] = {"recompute": [], "swap": []}
    for index, size in enumerate(SIZES):
        for mode, values in latency.items():
            progress(index / (len(SIZES) + 1), f"blocks of {size}, {mode}")
            requests = trace(sharegpt_like(0), poisson(RATE, 60 if quick else 150, seed=0))
            values.append(simulate(requests, block_size=size, preemption=mode).normalized_latency)
    rows = []
    for index, size in enumerate(SIZES):
        times = latency["swap"][index] / latency["recompute"][index]
        what = f"simulated latency, swap / recompute, blocks of {size}"
        rows.append(Row(what, times, "×", PAPER[size], READ, why=WHY_SIMULATED))
    progress(len(SIZES) / (len(SIZES) + 1), "this device")
    device: dict[int, dict[str, list[float]]] = {}
    for size in SIZES:
        device[size] = compare(_candidates(size), rounds=10 if quick else 30)
        times, spread = ratio(device[size]["swap"], device[size]["recompute"])
        what = f"{TOKENS} tokens on this device, swap / recompute, blocks of {size}"
        rows.append(Row(what, times, "×", PAPER[size], READ, spread, WHY_MEASURED))
    series = {mode: (SIZES, values) for mode, values in latency.items()}
    figure = lines("Recompute or swap", series, "block size, tokens", "normalized latency, s/token", log_x=True)
    assumed = [OPT_13B.stated(), f"ShareGPT-like lengths, Poisson arrivals, {RATE:g} requests/s."]
    return Result(rows, figure, assumed, {"normalized_latency": latency, "seconds_on_this_device": device})


def _candidates(block_size: int) -> dict[str, Callable[[], Any]]:
    """Recovers one sequence of the embedded model: by a prefill, or by swapping its blocks out and in."""
    from minipaged.config import SamplingParams
    from minipaged.llm import LLM

    num_blocks = -(-TOKENS // block_size)
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": TOKENS, "enable_prefix_caching": False}
    llm = LLM("tiny", block_size=block_size, num_blocks=num_blocks + 1, preemption="swap", **settings)
    space: Any = llm.engine.runner.space  # type: ignore[attr-defined]
    pairs = [(block, num_blocks - 1 - block) for block in range(num_blocks)]
    back = [(there, here) for here, there in pairs]
    prompt = [token % 1000 + 10 for token in range(TOKENS)]
    one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)

    def swap() -> None:
        space.swap_out(pairs)
        space.swap_in(back)

    return {"recompute": lambda: llm.generate([prompt], one), "swap": swap}
