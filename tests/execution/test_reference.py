"""Paged attention against attention over contiguous tensors, with NaN in every slot that must not be read."""

import pytest
import torch

from minipaged.kernels import reference


def dense(q, k, v, scale, window=None):
    """Textbook causal attention in float64 for the last len(q) positions. q: [n, H, D]; k, v: [L, KH, D]."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    position = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).float()


def paged(lengths, block_size, kv_heads, dim):
    """Random contexts stored in scattered blocks; everything else in the cache is NaN."""
    widest = max(-(-n // block_size) for n in lengths)
    num_blocks = sum(-(-n // block_size) for n in lengths) + 3
    order = iter(torch.randperm(num_blocks).tolist())
    k_cache, v_cache = (torch.full((num_blocks, block_size, kv_heads, dim), torch.nan) for _ in range(2))
    tables, contexts = torch.zeros(len(lengths), widest, dtype=torch.int64), []
    for b, n in enumerate(lengths):
        blocks = [next(order) for _ in range(-(-n // block_size))]
        tables[b, : len(blocks)] = torch.tensor(blocks)
        k, v = torch.randn(2, n, kv_heads, dim)
        slots = torch.tensor([blocks[i // block_size] * block_size + i % block_size for i in range(n)])
        reference.store_kv(k, v, k_cache, v_cache, slots)
        contexts.append((k, v))
    return k_cache, v_cache, tables, contexts


@pytest.mark.parametrize("block_size", [1, 3, 5, 16, 24])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_decode_equals_dense_attention(block_size, heads, kv_heads, window):
    lengths = [1, block_size, block_size + 1, 37]
    k_cache, v_cache, tables, contexts = paged(lengths, block_size, kv_heads, 8)
    q = torch.randn(len(lengths), heads, 8)
    out = reference.paged_decode(q, k_cache, v_cache, tables, torch.tensor(lengths), 0.3, window)
    for b, (k, v) in enumerate(contexts):
        torch.testing.assert_close(out[b : b + 1], dense(q[b : b + 1], k, v, 0.3, window))


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 4])
def test_prefill_equals_dense_attention_for_prompts_and_for_later_chunks(block_size, window):
    lengths, counts = [7, 20, 33], [7, 5, 1]  # a whole prompt, a chunk after 15 cached tokens, a decode
    k_cache, v_cache, tables, contexts = paged(lengths, block_size, 2, 8)
    q = torch.randn(sum(counts), 4, 8)
    out = reference.paged_prefill(q, k_cache, v_cache, tables, lengths, counts, 0.3, window)
    for rows, queries, (k, v) in zip(out.split(counts), q.split(counts), contexts, strict=True):
        torch.testing.assert_close(rows, dense(queries, k, v, 0.3, window))


def test_copies_read_before_any_write():
    cache = torch.arange(4.0)[:, None, None, None].clone()
    reference.copy_blocks([cache], torch.tensor([0, 1]), torch.tensor([1, 2]))  # 1 is a source and a target
    assert cache.flatten().tolist() == [0, 0, 1, 3]
