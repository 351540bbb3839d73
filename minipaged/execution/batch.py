"""Converts a `StepPlan` into tensors. Everything the model needs to know about a step is in one `Batch`."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from minipaged.core.plan import StepPlan


@dataclass
class Batch:
    """One step as tensors. T tokens of B sequences, flattened: no padding between sequences.

    The first ``num_decodes`` sequences have one token each: for attention they are decodes, even in a prompt.
    Longer chunks follow.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position of each token in its sequence
    slot_mapping: Tensor  # [T] int64, block · block_size + offset: where each token's KV goes
    block_tables: Tensor  # [B, M] int64, M: the longest table's blocks; padded with 0
    context_lens: Tensor  # [B] int64, tokens with KV once this step is done
    logit_rows: Tensor  # [R] int64, rows of the T that need logits: usually the last of each sampling chunk
    query_lens: list[int]  # [B], tokens of this step; sums to T
    context_lens_list: list[int]  # context_lens on the host, so that host code need not wait for the device
    num_decodes: int
    virtual_slots: list[int] | None = None  # [B], only with features.vattention: each sequence's contiguous region
    prompt_lens: list[int] | None = None  # [B], tokens in each sequence's prompt; only dynamic RoPE asks


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """Concatenates the plan's chunks into one `Batch` on ``device``."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    for chunk in plan.chunks:
        token_ids += chunk.token_ids
        span = range(chunk.start, chunk.start + chunk.num_tokens)
        positions += span
        slots += [chunk.block_table[p // block_size] * block_size + p % block_size for p in span]
        logit_rows += range(len(token_ids) - chunk.num_rows, len(token_ids))
    query_lens = [chunk.num_tokens for chunk in plan.chunks]
    context_lens = [chunk.start + chunk.num_tokens for chunk in plan.chunks]
    width = max(len(chunk.block_table) for chunk in plan.chunks)
    tables = [chunk.block_table + [0] * (width - len(chunk.block_table)) for chunk in plan.chunks]
    num_decodes = next((i for i, count in enumerate(query_lens) if count > 1), len(query_lens))

    # One transfer for everything: six small transfers to a GPU would cost six times the latency of one. From pinned
    # memory the transfer is asynchronous. An array is built from a list four times as fast as a tensor.
    columns = [token_ids, positions, slots, *tables, context_lens, logit_rows]
    sizes = [len(token_ids)] * 3 + [len(tables) * width, len(tables), len(logit_rows)]
    staged = torch.frombuffer(array("q", list(chain.from_iterable(columns))), dtype=torch.int64)
    if device.type == "cuda":
        staged = staged.pin_memory()
    on_device = staged.to(device, non_blocking=True).split_with_sizes(sizes)
    return Batch(
        token_ids=on_device[0],
        positions=on_device[1],
        slot_mapping=on_device[2],
        block_tables=on_device[3].view(len(tables), width),
        context_lens=on_device[4],
        logit_rows=on_device[5],
        query_lens=query_lens,
        context_lens_list=context_lens,
        num_decodes=num_decodes,
        virtual_slots=[plan.maps.slots[chunk.seq.seq_id] for chunk in plan.chunks] if plan.maps else None,
        prompt_lens=[chunk.seq.num_prompt for chunk in plan.chunks],
    )
