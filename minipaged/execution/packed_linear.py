"""Linear layers whose weights are laid out once for the CPU's matrix units, instead of anew for each product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 32  # oneDNN asks how many rows there will be; the layout that it chooses for a few serves any number


class PackedLinear(nn.Module):
    """`nn.Linear` for inference in bfloat16: the packed weights replace the plain ones. [T, in] → [T, out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16), and torch has oneDNN to ask for it."""
    cpu = torch.backends.cpu.get_cpu_capability()  # "AVX512", …: what torch was allowed to use
    if not torch.backends.mkldnn.is_available() or "AVX512" not in cpu:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pack(model: nn.Module) -> None:
    """Packs the linear layers of a bfloat16 model on such a CPU, one by one: no weight exists twice for longer.

    The output head stays as it is: most often it is the token embedding too, from which rows are read.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name != "lm_head" and isinstance(child, nn.Linear) and child.weight.dtype is torch.bfloat16:
                setattr(module, name, PackedLinear(child))
