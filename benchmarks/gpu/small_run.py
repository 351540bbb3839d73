"""Runs every kernel once on small random inputs of odd sizes, for compute-sanitizer."""

from __future__ import annotations

import torch

from minipaged.kernels.backend import kernels_for


def run(device: torch.device, attention: str) -> None:
    """Calls every kernel. Raises `ArithmeticError` if a result is not finite."""
    torch.manual_seed(0)
    dtype, kernels = torch.float16, kernels_for(attention, device)
    lengths, blocks, size, heads, kv_heads, dim = [1, 5, 33], 12, 5, 6, 2, 80

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    k_cache, v_cache = random(blocks, size, kv_heads, dim), random(blocks, size, kv_heads, dim)
    tables = torch.randperm(blocks, device=device)[:7].repeat(3, 1)
    lens, slots = torch.tensor(lengths, device=device), torch.tensor([3, 4, 59], device=device)
    x, delta, weight = random(3, 96), random(3, 96), random(96)
    cos, sin = random(3, 1, dim), random(3, 1, dim)

    kernels.store_kv(random(3, kv_heads, dim), random(3, kv_heads, dim), k_cache, v_cache, slots)
    q = kernels.rope_store(
        random(3, heads, dim), random(3, kv_heads, dim), random(3, kv_heads, dim), cos, sin, k_cache, v_cache, slots
    )
    outs = [kernels.paged_decode(q, k_cache, v_cache, tables, lens, 0.1)]
    outs.append(kernels.paged_prefill(random(10, heads, dim), k_cache, v_cache, tables, lengths, [1, 4, 5], 0.1))
    outs += kernels.add_norm(x, delta, weight, 1e-5)
    src, dst = torch.tensor([0, 11]), torch.tensor([2, 1])
    kernels.copy_blocks([k_cache, v_cache], src, dst)
    pinned = device.type == "cuda"
    space = [torch.zeros(2, size, kv_heads, dim, dtype=dtype, pin_memory=pinned) for _ in range(2)]
    kernels.swap_blocks([k_cache, v_cache], space, src, torch.tensor([1, 0]))
    kernels.swap_blocks(space, [k_cache, v_cache], torch.tensor([1, 0]), src)
    if not all(bool(out.isfinite().all()) for out in outs):  # also waits for the GPU
        raise ArithmeticError("a kernel's result contains a number that is not finite")


if __name__ == "__main__":
    run(torch.device("cuda"), "triton")
