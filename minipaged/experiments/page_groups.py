"""Batch size and waste by the size of page-groups, the units in which vAttention maps memory."""

from __future__ import annotations

from minipaged.experiments.figures import lines
from minipaged.experiments.result import Progress, Result, Row
from minipaged.experiments.saturation import Saturated, saturate, sharegpt_traces
from minipaged.experiments.simulator import OPT_13B

SIZES = (16, 32, 64, 256, 1024, 2048)  # tokens per page-group
MANAGERS = ("vattention", "paged")


def measure(quick: bool, progress: Progress) -> Result:
    """Mean batch and percent of slots with a token by page-group size, beside paged blocks of the same size."""
    traces = sharegpt_traces(quick)[: 1 if quick else 4]
    runs: dict[str, list[Saturated]] = {memory: [] for memory in MANAGERS}
    for index, size in enumerate(SIZES):
        for memory in MANAGERS:
            progress(index / len(SIZES), f"{memory}, {size} tokens")
            mapping = {"mapping": "sync"} if memory == "vattention" else {}
            runs[memory].append(saturate(*traces, memory=memory, block_size=size, **mapping))
    rows = []
    for index, size in enumerate(SIZES):
        ours, paged = runs["vattention"][index], runs["paged"][index]
        rows += [
            Row(f"{size} tokens a page-group: mean batch", ours.mean_batch, "requests"),
            Row(f"{size} tokens a page-group: slots with a token", ours.percent["token"], "% of the pool"),
            Row(f"{size} tokens: less than paged", paged.percent["token"] - ours.percent["token"], "points"),
        ]
    series = {memory: (SIZES, [run.mean_batch for run in of_one]) for memory, of_one in runs.items()}
    figure = lines("Batch by granularity", series, "tokens per page-group or block", "requests at once", log_x=True)
    assumed = [
        OPT_13B.stated() + " Mapping costs nothing here.",
        "Llama-3-8B in float16 with pages of 2 MB has 1024 tokens a page-group, and 32 with tensor slicing.",
    ]
    data = {memory: [[run.mean_batch, run.percent] for run in of_one] for memory, of_one in runs.items()}
    return Result(rows, figure, assumed, data)
