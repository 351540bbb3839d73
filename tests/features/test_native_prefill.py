"""Chunked prefill in C++ against the model's own forward: head widths, block sizes, windows, NaN in other slots."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.features.cpu_step import NativeForward
from minipaged.kernels import native
from minipaged.kernels.backend import kernels_for
from minipaged.models.loader import load_model
from tests.models.families import randomize

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if lacking := native.missing():
        pytest.skip(lacking)


def model_of(path, dtype: str, heads: int, kv_heads: int, head_dim: int, window: int | None):
    sizes = dict(
        vocab_size=131, hidden_size=32 * heads, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    config = MistralConfig(**sizes, sliding_window=window) if window else LlamaConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(path)
    return load_model(str(path), "cpu", dtype).model


def chunk(tables: torch.Tensor, size: int, done: list[int], counts: list[int]) -> Batch:
    """The next ``counts[i]`` tokens of sequence i, after ``done[i]`` cached tokens; each token gives logits."""
    pairs = [(i, p) for i, n in enumerate(counts) for p in range(done[i], done[i] + n)]
    lens = [start + n for start, n in zip(done, counts, strict=True)]
    return Batch(
        token_ids=torch.randint(0, 131, (len(pairs),), generator=torch.Generator().manual_seed(sum(done))),
        positions=torch.tensor([p for _, p in pairs]),
        slot_mapping=torch.tensor([int(tables[i, p // size]) * size + p % size for i, p in pairs]),
        block_tables=tables,
        context_lens=torch.tensor(lens),
        logit_rows=torch.arange(len(pairs)),
        query_lens=counts,
        context_lens_list=lens,
        num_decodes=0,
    )


# Chunks of 70 end inside tiles of 64 keys; 2 and 5 fill few lanes. Each chunk starts where its predecessor ended.
CHUNKS = [[70, 2, 17], [5, 69, 2], [64, 33, 100]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "size", "window"),
    [
        (9, 3, 64, 16, None), (4, 4, 64, 8, 37), (8, 1, 32, 4, None), (4, 2, 80, 16, 3), (10, 2, 96, 1, None),
        (2, 2, 128, 32, 1), (4, 4, 48, 4, 130),
    ],
)  # fmt: skip
def test_chunks_of_prompts_are_the_models_whatever_lies_around_them(
    tmp_path, dtype, heads, kv_heads, head_dim, size, window
):
    model = model_of(tmp_path, dtype, heads, kv_heads, head_dim, window)
    exact = copy.deepcopy(model).float()
    each = -(-140 // size)
    order = torch.randperm(3 * each + 2, generator=torch.Generator().manual_seed(1))
    tables = order[: 3 * each].view(3, each)
    caches = []
    for numbers in (getattr(torch, dtype), getattr(torch, dtype), torch.float32):
        sizes = (2, 3 * each + 2, size, kv_heads, head_dim)
        caches.append(KVCache(*sizes, numbers, CPU, kernels=kernels_for("native", CPU)))
        for tensor in caches[-1].k + caches[-1].v:
            tensor.fill_(float("nan"))  # a read of an unwritten slot makes the logits NaN
    ours, done = NativeForward(model, caches[0]), [0, 0, 0]
    for counts in CHUNKS:
        batch = chunk(tables, size, done, counts)
        with torch.inference_mode():
            found, theirs, expected = ours.run(batch), model(batch, caches[1]), exact(batch, caches[2])
        if dtype == "float32":
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        else:  # not less exact than torch, which rounds at the same places
            assert (found - expected).square().mean() <= 1.5 * (theirs - expected).square().mean()
        done = [a + b for a, b in zip(done, counts, strict=True)]
