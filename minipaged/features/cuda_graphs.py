"""CUDA graphs: records a decode step's hundreds of kernel launches once, and replays them with one call.

A GPU computes a decode step of a small batch faster than Python can launch its kernels. A graph launches all of them at
once, but always the same ones, on the same memory. So one graph is recorded for each of a few batch sizes. A batch is
copied into the inputs of the next larger size; padding rows write to a scratch block that belongs to no sequence.

Adds ``cuda_graphs``. It is a ``forward`` for `execution.runner.ModelRunner`. Read `DecodeGraphs.run` first. The page
does not show it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipaged.errors import InvalidConfig
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache

Model = Callable[[Batch, KVCache], Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that get a graph; the largest is ``max_num_seqs`` itself.

    Sizes are closest where padding would cost most: at most 7 padding rows below 256 sequences, 31 above.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def use_graphs(config: Any, attention: str, device: torch.device) -> bool:
    """Whether to use CUDA graphs, from ``EngineConfig.cuda_graphs``, the device and the attention backend.

    Raises `InvalidConfig` if they are requested but not possible. Plain torch gathers as many blocks as the longest
    sequence has; a graph knows no lengths, so it would gather the maximum for all. vAttention finds a sequence by its
    address range, not through a block table, and under a graph only the contents of block tables can change.
    """
    possible = device.type == "cuda" and attention == "triton" and config.memory != "vattention"
    if config.cuda_graphs and not possible:
        raise InvalidConfig(
            f"cuda_graphs=True needs CUDA, attention by Triton and block tables, but this is {device.type} with "
            f'attention={attention!r} and memory={config.memory!r}; set device="cuda", attention="triton" and '
            'memory="paged", or leave cuda_graphs out'
        )
    return possible if config.cuda_graphs is None else config.cuda_graphs


class DecodeGraphs:
    """Runs decode-only batches of a model by replaying graphs.

    A graph is recorded when its size is first needed. ``scratch_block`` is a block of the cache that no block table
    contains. ``record`` takes a function and returns one that replays it, and the tensor that will hold the result.
    """

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_blocks: int,
        scratch_block: int,
        record: Record | None = None,
    ) -> None:
        self._model, self._kv_cache = model, kv_cache
        self.sizes = batch_sizes(max_num_seqs)
        self._record = record or recorder()
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}

        def full(shape: tuple[int, ...], value: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        # A padding row is one token of a sequence of length 1 in the scratch block.
        self._padding = {
            "token_ids": 0, "positions": 0, "slot_mapping": scratch_block * kv_cache.block_size, "context_lens": 1,
        }  # fmt: skip
        self._inputs = {name: full((max_num_seqs,), value) for name, value in self._padding.items()}
        self._block_tables = full((max_num_seqs, max_blocks), scratch_block)
        self._rows = torch.arange(max_num_seqs, device=device)
        self._scratch_block = scratch_block

    def covers(self, batch: Batch) -> bool:
        """Whether the batch has exactly one query token per sequence, and each is sampled from.

        ``False`` under vAttention, whose contexts change address and shape in every step, and for a batch of BatchLLM
        that is larger than the largest graph.
        """
        B = len(batch.query_lens)
        return batch.num_decodes == B == len(batch.logit_rows) <= self.sizes[-1] and batch.virtual_slots is None

    def __call__(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Logits [R, V]: from a graph if `covers` accepts the batch, else from the model."""
        return self.run(batch) if self.covers(batch) else self._model(batch, kv_cache)

    def run(self, batch: Batch) -> Tensor:
        """Logits [B, V] of a batch that `covers` accepts. They are overwritten by the next run."""
        B = len(batch.query_lens)
        size = next(size for size in self.sizes if size >= B)
        for name, value in self._padding.items():
            self._inputs[name][:B] = getattr(batch, name)
            self._inputs[name][B:size] = value
        self._block_tables[:B, : batch.block_tables.shape[1]] = batch.block_tables
        self._block_tables[B:size, 0] = self._scratch_block
        if size not in self._graphs:
            padded = self._padded(size)
            self._graphs[size] = self._record(lambda: self._model(padded, self._kv_cache))
        replay, logits = self._graphs[size]
        replay()
        return logits[:B]

    def _padded(self, size: int) -> Batch:
        """A batch of ``size`` sequences whose tensors are views of the inputs."""
        return Batch(
            token_ids=self._inputs["token_ids"][:size],
            positions=self._inputs["positions"][:size],
            slot_mapping=self._inputs["slot_mapping"][:size],
            block_tables=self._block_tables[:size],
            context_lens=self._inputs["context_lens"][:size],
            logit_rows=self._rows[:size],
            query_lens=[1] * size,
            context_lens_list=[],  # unused: lengths change between replays
            num_decodes=size,
        )


def recorder() -> Record:
    """Returns a function that records graphs on the current CUDA device. They share memory: only one runs at a time."""
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # Warm-up on another stream: libraries allocate workspaces in it, and Triton compiles.
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only calls of this thread can invalidate the recording: other threads may run other engines.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = forward()
        return graph.replay, logits

    return record
