"""A rank's share of a model: all layers of the whole model, but narrower (Megatron-LM, Shoeybi et al. 2019).

Each of ``world`` processes has an equal share of every layer's heads and of the width inside its MLP. Its layers
compute partial sums of what the whole layers would add to the residual stream. So attention and MLP each end in a sum
over the ranks (an all-reduce), and nothing else is exchanged. Every rank has the whole embeddings, norms and output
head: to split the vocabulary, too, would save memory and cost another exchange.
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

SUMMANDS = ("o_proj", "down_proj", "c_proj")  # layers split along their input; others are split along their output


@dataclass(frozen=True)
class Shard:
    """The part of a model that process ``rank`` of ``world`` has."""

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
        """This rank's part of a checkpoint's tensor: ``shape`` is smaller in one dimension, or in none."""
        split = [dim for dim, size in enumerate(shape) if size != whole.shape[dim]]
        if not split:
            return whole
        # GPT-2 stores query, key and value weights side by side, and each of the three has all heads.
        kinds = whole.chunk(3 if "c_attn" in name else 1, split[0])
        return torch.cat([kind.chunk(self.world, split[0])[self.rank] for kind in kinds], split[0])

    def join(self, network: nn.Module) -> None:
        """Adds an all-reduce after layers that compute partial sums. Only rank 0 keeps their bias: it counts once."""
        for module in list(network.modules()):
            children: dict[str, Any] = dict(module.named_children())
            for name, linear in children.items():
                if name in SUMMANDS:
                    if self.rank and linear.bias is not None:
                        linear.bias.zero_()
                    setattr(module, name, RowParallel(linear))


class RowParallel(nn.Module):
    """A linear layer split along its input: each rank has some columns and their inputs. [T, in / world] → [T, out]"""

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
    """Context of all communication between ranks. Raises `WorkerFailed` if another process is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise no specific type, and their messages are long
        raise WorkerFailed(f"another process of the group is gone: {str(error).split('. ')[0]}") from error
