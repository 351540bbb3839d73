"""minipaged's models against those of transformers, on logits and on greedy tokens.

The reference computes each finished sequence in one dense forward pass; minipaged computes it in steps, chunks
and blocks. If the logits agree at every position and the greedy token is the one that minipaged chose, then by
induction the reference would have generated the same sequence.
"""

from __future__ import annotations

import random

import pytest
import torch

from minipaged.config import SamplingParams
from minipaged.core.plan import Chunk, StepPlan
from minipaged.core.request import Request, Sequence
from minipaged.core.seams import Sampling
from minipaged.execution.batch import build_batch
from minipaged.execution.kv_cache import KVCache
from minipaged.models.loader import LoadedModel, load_model
from tests.models.families import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)

PLAIN = Sampling(SamplingParams(), frozenset())
WHOLE = 10_000  # a chunk larger than any prompt
TOLERANCE = 1e-4  # of the largest logit


class Driver:
    """A minimal engine: all sequences run, blocks are scattered, and none is freed."""

    def __init__(self, loaded: LoadedModel, block_size: int) -> None:
        spec = loaded.spec
        self.loaded, self.block_size = loaded, block_size
        num_blocks = 400 // block_size + 8
        self.cache = KVCache(
            spec.num_layers,
            num_blocks,
            block_size,
            spec.num_kv_heads,
            spec.head_dim,
            loaded.dtype,
            loaded.device,
        )
        for tensor in self.cache.k + self.cache.v:
            tensor.fill_(float("nan"))  # an unwritten slot must not be read
        self.free = random.Random(3).sample(range(num_blocks), num_blocks)
        self.tables: dict[int, list[int]] = {}

    def chunk(self, seq: Sequence, most: int) -> Chunk:
        count = min(most, len(seq.tokens) - seq.num_computed)
        end = seq.num_computed + count
        table = self.tables.setdefault(seq.seq_id, [])
        while len(table) * self.block_size < end:
            table.append(self.free.pop())
        return Chunk(
            request=Request(str(seq.seq_id), seq.tokens, SamplingParams(), [seq], frozenset(), 99, 0, PLAIN),
            seq=seq,
            start=seq.num_computed,
            num_tokens=count,
            samples=[seq] if end == len(seq.tokens) else [],
            block_table=list(table),
        )

    @torch.inference_mode()
    def step(self, seqs: list[Sequence], most: int) -> list[tuple[Sequence, torch.Tensor]]:
        chunks = sorted((self.chunk(seq, most) for seq in seqs), key=lambda chunk: chunk.num_tokens > 1)
        batch = build_batch(StepPlan(0, chunks), self.block_size, self.loaded.device)
        logits = self.loaded.model(batch, self.cache)
        for chunk in chunks:
            chunk.seq.num_computed += chunk.num_tokens
        sampled = [seq for chunk in chunks for seq in chunk.samples]
        assert logits.shape == (len(sampled), self.loaded.spec.vocab_size) and logits.dtype == torch.float32
        return list(zip(sampled, logits, strict=True))

    def greedy(
        self, prompts: list[list[int]], num_new: int, most: int = WHOLE, stagger: int = 0
    ) -> list[tuple[Sequence, torch.Tensor]]:
        """Generates ``num_new`` tokens for every prompt; prompt i joins the batch after i · stagger steps."""
        seqs = [Sequence(i, list(prompt), len(prompt), random.Random(0)) for i, prompt in enumerate(prompts)]
        rows: dict[int, list[torch.Tensor]] = {seq.seq_id: [] for seq in seqs}
        step = 0
        while any(seq.num_output < num_new for seq in seqs):
            running = [s for i, s in enumerate(seqs) if i * stagger <= step and s.num_output < num_new]
            for seq, row in self.step(running, most) if running else ():
                seq.tokens.append(int(row.argmax()))
                rows[seq.seq_id].append(row)
            step += 1
        return [(seq, torch.stack(rows[seq.seq_id])) for seq in seqs]


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(131) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def check(reference: torch.nn.Module, seq: Sequence, rows: torch.Tensor) -> float:
    """Asserts equal tokens and close logits; returns the largest error relative to the largest logit."""
    dense = reference(torch.tensor([seq.tokens[:-1]])).logits[0, seq.num_prompt - 1 :]
    error = float((rows - dense).abs().max() / dense.abs().max())
    assert error < TOLERANCE
    assert dense.argmax(dim=-1).tolist() == seq.output_tokens
    return error


@every_family
@pytest.mark.parametrize(("block_size", "most"), [(1, 5), (3, WHOLE), (16, 4)])
def test_batch_equals_transformers(family, block_size, most, checkpoint, hugging_face):
    driver = Driver(load_model(str(checkpoint(family)), "cpu"), block_size)
    for seq, rows in driver.greedy(prompts_of((1, 14, 33, 5)), 6, most, stagger=2):
        check(hugging_face(family), seq, rows)


@every_family
def test_alone_equals_batch(family, checkpoint, hugging_face):
    loaded = load_model(str(checkpoint(family)), "cpu")
    prompts = prompts_of((6, 16, 20))
    together = Driver(loaded, 4).greedy(prompts, 6)
    for prompt, (seq, rows) in zip(prompts, together, strict=True):
        [(alone, alone_rows)] = Driver(loaded, 4).greedy([prompt], 6)
        assert alone.tokens == seq.tokens
        torch.testing.assert_close(alone_rows, rows, rtol=1e-4, atol=1e-4)
        check(hugging_face(family), alone, alone_rows)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral"])
def test_up_to_the_last_position(family, checkpoint, hugging_face):
    driver = Driver(load_model(str(checkpoint(family)), "cpu"), 16)
    [(seq, rows)] = driver.greedy(prompts_of((100,)), 128 - 100, most=40)
    check(hugging_face(family), seq, rows)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gpt2"])
def test_middle_of_a_prompt_has_no_logits(family, checkpoint):
    driver = Driver(load_model(str(checkpoint(family)), "cpu"), 4)
    seq = Sequence(0, list(range(10)), 10, random.Random(0))
    assert driver.step([seq], 6) == []
    assert len(driver.step([seq], 6)) == 1


@pytest.mark.parametrize("option", ["rope", "window"])
def test_the_options_matter(option, checkpoint, hugging_face):
    """Parity proves nothing about an option without effect, so results must differ without the option."""
    reference = hugging_face({"rope": "llama3", "window": "mistral"}[option])
    tokens = torch.tensor(prompts_of((33,)))
    with torch.inference_mode():
        right = reference(tokens).logits
        config = type(reference.config)(**reference.config.to_dict())
        if option == "rope":
            config.rope_parameters = dict(rope_type="default", rope_theta=500.0)
        else:
            config.sliding_window = None
        config._attn_implementation = "eager"
        other = type(reference)(config).eval()
        other.load_state_dict(reference.state_dict())
        assert (other(tokens).logits - right).abs().max() > 100 * TOLERANCE * right.abs().max()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "bfloat16") for family in FAMILIES), ("gpt2", "float16"), ("qwen3", "float16")],
)
def test_half_precision_is_close(family, dtype, checkpoint, hugging_face):
    loaded = load_model(str(checkpoint(family)), "cpu", dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)} == {loaded.dtype}
    prompt = prompts_of((12,))[0]
    [(_, rows)] = Driver(loaded, 4).greedy([prompt], 1)
    with torch.inference_mode():
        dense = hugging_face(family)(torch.tensor([prompt])).logits[0, -1]
    # A loose bound, because weights this large make each softmax nearly one-hot; a wrong cast deviates far more.
    assert torch.nn.functional.cosine_similarity(rows[0], dense, dim=0) > 0.95
