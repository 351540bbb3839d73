"""Measures vAttention on this machine: the time of mapping, of attention, and of whole steps, sync and async.

    python -m benchmarks.vattention_cost [--rounds 5] [--threads 1]

It writes benchmarks/results/virtual_memory.json.

The candidates of each comparison take turns. Times are medians with the 10th and 90th percentile; ratios compare
medians unless stated otherwise.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.result_files import write
from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.features.vattention import slot_attention as contiguous
from minipaged.features.vattention.page_memory import HostMemory
from minipaged.kernels import reference

MODES: dict[str, dict[str, Any]] = {
    "paged": {"memory": "paged"},
    "sync": {"memory": "vattention", "mapping": "sync"},
    "eager": {"memory": "vattention", "mapping": "eager"},
    "async": {"memory": "vattention", "mapping": "async"},
    "async, sliced": {"memory": "vattention", "mapping": "async", "tensor_slicing": True},
}


def spread(seconds: list[float]) -> dict[str, float]:
    """Converts seconds to microseconds: 10th percentile, median, 90th percentile."""
    cuts = statistics.quantiles(seconds, n=10)
    return {"p10": cuts[0] * 1e6, "median": statistics.median(seconds) * 1e6, "p90": cuts[-1] * 1e6}


def show(name: str, times: dict[str, float], note: str = "") -> None:
    print(f"  {name:34} {times['median']:9.1f} µs  ({times['p10']:.1f} – {times['p90']:.1f})  {note}")


def take_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 3):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if round_ >= 3:  # rounds 0 to 2 are warm-up
                times[name].append(time.perf_counter() - started)
    return {name: spread(seconds) for name, seconds in times.items()}


def mapping(rounds: int) -> dict[str, Any]:
    """Times mapping one page-group, with and without the first access to it, and mapping sixteen in one call."""
    print("mapping, for each page-group")
    result = {}
    for pages in (1, 4):
        memory = HostMemory(pages * mmap.PAGESIZE, 64, 64)
        memory.pool.zero_()  # allocates the pages, as in a warm engine

        def touched(place: int = 0, memory: HostMemory = memory) -> None:
            memory.map(place, 5, 1)
            memory.space[place * memory.page_bytes].item()

        def both(count: int, memory: HostMemory = memory) -> None:
            memory.map(16, 0, count)
            memory.unmap(16, count)

        sides = {
            "map": lambda memory=memory: memory.map(0, 5, 1),
            "map and read": touched,
            "map, unmap": lambda: both(1),
            "map, unmap 16 in a row (all 16)": lambda: both(16),
        }
        for name, times in take_turns(sides, 200 * rounds).items():
            result[f"{name}, {pages * mmap.PAGESIZE} bytes"] = times
            show(f"{name}, {pages * mmap.PAGESIZE // 1024} KiB", times)
    return result


def attention(rounds: int) -> dict[str, Any]:
    """Times decode attention of one layer: gathered blocks, a padded slice of all slots, slot by slot."""
    print("decode attention, one layer: 8 query heads, 4 key/value heads of 32, contexts from L/4 to L")
    result = {}
    torch.manual_seed(0)
    k, v = torch.randn(64, 1024, 4, 32), torch.randn(64, 1024, 4, 32)
    for batch, length in ((1, 256), (8, 256), (32, 256), (8, 1000), (32, 1000)):
        lens = torch.linspace(length // 4, length, batch).int().tolist() if batch > 1 else [length]
        tables = torch.stack([slot * 64 + torch.arange(-(-length // 16)) for slot in range(batch)])
        q, context_lens, slots = torch.randn(batch, 8, 32), torch.tensor(lens), list(range(batch))
        blocks = (k.view(-1, 16, 4, 32), v.view(-1, 16, 4, 32))

        def paged(q=q, blocks=blocks, tables=tables, lens=context_lens) -> torch.Tensor:
            return reference.paged_decode(q, *blocks, tables, lens, 32**-0.5)

        def padded(q=q, batch=batch, length=length, lens=context_lens) -> torch.Tensor:
            visible = (torch.arange(length) < lens[:, None])[:, None, None]
            kv = (x[:batch, :length].transpose(1, 2) for x in (k, v))
            scores = torch.nn.functional.scaled_dot_product_attention
            return scores(q.view(batch, 4, 2, 32), *kv, attn_mask=visible, scale=32**-0.5).reshape(q.shape)

        def virtual(q=q, slots=slots, lens=lens) -> torch.Tensor:
            return contiguous.attention(q, k, v, slots, lens, [1] * len(lens), 32**-0.5)

        torch.testing.assert_close(paged(), virtual(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded(), virtual(), rtol=1e-4, atol=1e-5)
        times = take_turns({"paged": paged, "padded slice": padded, "vattention": virtual}, 6 * rounds)
        for name, one in times.items():
            ratio = times["paged"]["median"] / one["median"]
            show(f"B = {batch}, L = {length}, {name}", one, f"{ratio:.2f} × as fast as paged")
            result[f"B={batch} L={length} {name}"] = one | {"ratio": ratio}
    return result


def steps(rounds: int) -> dict[str, Any]:
    """Times steps of the tiny model: 24 requests of 40 + 80 tokens, in page-groups of 8 tokens (a page, one layer)."""
    print("steps of the tiny model: 24 requests at once, 40 tokens in, 80 out, page-groups of 8 tokens")
    llm = LLM("tiny", device="cpu", dtype="float32", num_blocks=1)
    taken: dict[str, dict[str, list[float]]] = {name: {"step": [], "mapping": [], "run": []} for name in MODES}
    told = set()
    for round_ in range(rounds + 1):
        for name, settings in MODES.items():
            config = EngineConfig(
                device="cpu", dtype="float32", block_size=8, num_blocks=24 * 15 + 16, max_num_seqs=24,
                enable_prefix_caching=False, **settings,
            )  # fmt: skip
            times, tokens = run(llm, config)
            told.add(str(tokens))
            for what, seconds in times.items() if round_ else ():
                taken[name][what] += seconds
    assert len(told) == 1, "every mode gives the same tokens"
    result: dict[str, Any] = {}
    for name, times in taken.items():
        result[name] = {"step": spread(times["step"]), "run_s": statistics.median(times["run"])}
        rate = 24 * 80 / result[name]["run_s"]
        show(f"{name}: a step", result[name]["step"], f"{rate:.0f} tokens/s")
        if name != "paged":
            # All sequences grow in lockstep, so nine of ten steps map nothing; what matters are the spikes.
            spikes = sorted(times["mapping"])[-len(times["mapping"]) // 10 :]
            result[name] |= {"mapping": spread(times["mapping"]), "spikes": spread(spikes)}
            show(f"{name}: mapping, slowest tenth", result[name]["spikes"], "before the forward pass begins")
    for name in ("eager", "async", "async, sliced"):
        # On a busy machine the median includes waiting for a core; the 10th percentile is closer to the mapping itself.
        for which in ("median", "p10"):
            ratio = result["sync"]["spikes"][which] / result[name]["spikes"][which]
            print(f"  mapping spikes ({which}), sync / {name}: {ratio:.1f} ×")
    return result


def run(llm: LLM, config: EngineConfig) -> tuple[dict[str, list[float]], list]:
    engine = llm.build_engine(config)
    times: dict[str, list[float]] = {"step": [], "mapping": [], "run": []}
    cache: Any = engine.runner.kv_cache  # type: ignore[attr-defined]
    remap = cache.remap

    def timed(maps: Any) -> None:
        started = time.perf_counter()
        remap(maps)
        times["mapping"].append(time.perf_counter() - started)

    cache.remap = timed
    for i in range(24):
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        engine.add_request(str(i), [20 + i] * 40, params)
    tokens = []
    while engine.has_unfinished():
        started = time.perf_counter()
        outputs = engine.step()
        times["step"].append(time.perf_counter() - started)
        tokens += [output.outputs[0].token_ids for output in outputs if output.finished]
    times["run"].append(sum(times["step"]))
    return times, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        result = {
            "threads": options.threads, "mapping": mapping(options.rounds), "attention": attention(options.rounds),
            "steps": steps(options.rounds),
        }  # fmt: skip
    write("virtual_memory", result, f"python -m benchmarks.vattention_cost --rounds {options.rounds}")


if __name__ == "__main__":
    main()
