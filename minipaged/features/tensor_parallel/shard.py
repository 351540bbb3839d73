"""A rank's share of a model: as deep as the whole one, but narrower (Megatron-LM, Shoeybi et al. 2019).

Each of ``world`` processes has as many of every layer's heads as the others, and as much of the width inside its MLP.
What its layers compute are summands of what the whole layers would add to the residual stream. So attention and MLP
each end in a sum over the ranks, and nothing else is exchanged on the way. The embeddings, the norms and the output
head are on every rank, whole: to split the vocabulary, too, would save memory and cost another exchange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist  # importing torch has imported it
from torch import Tensor, nn

from minipaged.errors import InvalidConfig, WorkerFailed

SUMMANDS = ("o_proj", "down_proj", "c_proj")  # the layers whose input is shared out; of others it is the output


@dataclass(frozen=True)
class Shard:
    """The part of process ``rank`` among ``world`` of them."""

    rank: int
    world: int

    def config(self, config: Any) -> Any:
        """A model's configuration with one rank's heads and width. Raises `InvalidConfig` if they do not divide."""
        sizes = {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "intermediate_size")}
        if any(size % self.world for size in sizes.values()):
            raise InvalidConfig(
                f"{self.world} processes cannot share this model evenly: it has {sizes['num_heads']} heads, "
                f"{sizes['num_kv_heads']} key/value heads, and an MLP {sizes['intermediate_size']} wide; "
                f"start a number of processes that divides {math.gcd(*sizes.values())}"
            )
        return replace(config, **{name: size // self.world for name, size in sizes.items()})

    def part(self, name: str, whole: Tensor, shape: torch.Size) -> Tensor:
        """This rank's part of a tensor as the checkpoint has it: in one dimension ``shape`` is smaller, or in none."""
        split = [dim for dim, size in enumerate(shape) if size != whole.shape[dim]]
        if not split:
            return whole
        # GPT-2 stores the queries', keys' and values' weights side by side, and all heads are in each of the three.
        kinds = whole.chunk(3 if "c_attn" in name else 1, split[0])
        return torch.cat([kind.chunk(self.world, split[0])[self.rank] for kind in kinds], split[0])

    def join(self, network: nn.Module) -> None:
        """Puts the sums over the ranks behind the layers that compute summands. Only rank 0's have a bias."""
        for module in list(network.modules()):
            children: dict[str, Any] = dict(module.named_children())
            for name, linear in children.items():
                if name in SUMMANDS:
                    if self.rank and linear.bias is not None:
                        linear.bias.zero_()
                    setattr(module, name, RowParallel(linear))


class RowParallel(nn.Module):
    """A linear layer of which each rank has some columns, and the inputs for those. [T, in / world] → [T, out]"""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        with connected():
            dist.all_reduce(out)
        return out


@contextmanager
def connected() -> Iterator[None]:
    """For all that the processes say to each other. Raises `WorkerFailed` where another has left."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no better name for it, and many words
        raise WorkerFailed(f"another process of the group is gone: {str(error).split('. ')[0]}") from error
