"""The C++ forward pass of a whole step against the model's own: every family, every path through the kernels."""

import os
import platform
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from minipaged import LLM, SamplingParams
from minipaged.execution.batch import Batch
from minipaged.execution.kv_cache import KVCache
from minipaged.features import attention_view
from minipaged.features.cpu_step import NativeForward
from minipaged.kernels import native
from minipaged.kernels.backend import kernels_for
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama
from minipaged.models.loader import load_model
from tests.checkpoints import save_llama
from tests.models.families import FAMILIES, config_of, randomize

CPU = torch.device("cpu")
SIZE = 8  # slots in a block


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if lacking := native.missing():
        pytest.skip(lacking)


def load(tmp_path, family: str, dtype: str):
    """A model in which every weight matters; wider in bfloat16, whose kernels multiply 32 channels at a time."""
    config = config_of(family)
    if dtype == "bfloat16":
        for name in ("hidden_size", "n_embd"):
            if hasattr(config, name):
                setattr(config, name, 96 if family == "smollm2" else 64)
        config.update({"n_inner": 160} if family.startswith("gpt2") else {"intermediate_size": 160})
        config.update({"head_dim": 32} if not family.startswith("gpt2") else {})
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(tmp_path)
    return load_model(str(tmp_path), "cpu", dtype).model


def cache_for(model, dtype, blocks=96) -> KVCache:
    config = model.config
    heads = (config.num_kv_heads, config.head_dim)
    cache = KVCache(config.num_layers, blocks, SIZE, *heads, dtype, CPU, kernels=kernels_for("native", CPU))
    for tensor in cache.k + cache.v:
        tensor.fill_(float("nan"))  # a read of an unwritten slot makes the logits NaN
    return cache


def step(tables: list[list[int]], done: list[int], counts: list[int], all_rows: bool = False) -> Batch:
    """A batch with the next ``counts[i]`` tokens of sequence i, after its ``done[i]`` computed tokens."""
    generator = torch.Generator().manual_seed(sum(done) + 1)
    positions = [p for start, n in zip(done, counts, strict=True) for p in range(start, start + n)]
    owners = [i for i, n in enumerate(counts) for _ in range(n)]
    slots = [tables[i][p // SIZE] * SIZE + p % SIZE for i, p in zip(owners, positions, strict=True)]
    lens = [start + n for start, n in zip(done, counts, strict=True)]
    ends = torch.tensor(counts).cumsum(0) - 1
    return Batch(
        token_ids=torch.randint(0, 131, (len(positions),), generator=generator),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor(tables),
        context_lens=torch.tensor(lens),
        logit_rows=torch.arange(len(positions)) if all_rows else ends,
        query_lens=counts,
        context_lens_list=lens,
        num_decodes=next((i for i, n in enumerate(counts) if n > 1), len(counts)),
    )


def scattered(num_seqs: int, each: int) -> list[list[int]]:
    return torch.randperm(96, generator=torch.Generator().manual_seed(3))[: num_seqs * each].view(-1, each).tolist()


STEPS = [
    # Tokens by step and sequence: a single sequence, chunked prefills with decodes, and steps of over 16 and 32 tokens.
    [[1], [1], [4]],
    [[1, 1, 5, 20], [1, 1, 1, 9], [1, 1, 1, 1]],
    [[3] * 12, [1] * 12],
]


def assert_same(model, dtype, run=None, tolerance=1e-4, steps=STEPS):
    for number, counts in enumerate(steps):
        tables = scattered(len(counts[0]), 96 // max(len(counts[0]), 16))
        caches = [cache_for(model, dtype) for _ in range(2)]
        ours = NativeForward(model, caches[0])
        if run is not None:
            ours._forward = run
        done = [0] * len(tables)
        for these in counts:
            batch = step(tables, done, these, all_rows=number == 1)
            with torch.inference_mode():
                found, expected = ours.run(batch), model(batch, caches[1])
            assert found.dtype == torch.float32 and expected.isfinite().all()
            assert_close(found, expected, tolerance)
            done = [a + b for a, b in zip(done, these, strict=True)]
        for mine, theirs in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan()), "a slot outside the step was written"
            assert_close(mine.nan_to_num(), theirs.nan_to_num(), tolerance)


def assert_close(found, expected, tolerance):
    """Compares each number in float32, and the norm of the error in both dtypes: a single bfloat16 may be far off."""
    if tolerance < 1e-3:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()


UNSERVED = {"gpt2-untied", "qwen3"}  # because of their widths in these tests


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in UNSERVED])
def test_every_family_in_float32(tmp_path, family):
    assert_same(load(tmp_path, family, "float32"), torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "llama-yarn", "llama-biased", "mistral", "qwen2", "qwen3-window"])
def test_families_in_bfloat16(tmp_path, family):
    assert_same(load(tmp_path, family, "bfloat16"), torch.bfloat16, tolerance=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_many_tokens_of_which_each_thread_takes_its_own(tmp_path, monkeypatch, family, dtype):
    monkeypatch.setattr("minipaged.features.cpu_step.SMALL", 0)
    threads = torch.get_num_threads()
    model = load(tmp_path, family, dtype)
    for count, counts in ((2, [43] * 6 + [4]), (3, [43] * 9)):  # 262 = 160 + 102; 387 = 160 + 160 + 67
        torch.set_num_threads(count)
        try:
            assert_same(model, getattr(torch, dtype), tolerance=1e-4 if dtype == "float32" else 0.06, steps=[[counts]])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [*range(1, 18), 33, 48, 49, 64, 65, 80])
def test_any_number_of_tokens(tmp_path, count):
    assert_same(load(tmp_path, "mistral", "float32"), torch.float32, steps=[[[1] * count, [1] * count]])


@pytest.mark.parametrize("level", ["", "x86-64-v3", "x86-64-v4"])
def test_with_the_registers_of_other_cpus(tmp_path, level):
    """Registers of 4 numbers (any x86-64 CPU), of 8 (AVX2, most laptops) and of 16 (AVX-512)."""
    needs = {"x86-64-v3": ("AVX2", "AVX512"), "x86-64-v4": ("AVX512",)}
    if level and torch.backends.cpu.get_cpu_capability() not in needs[level]:
        pytest.skip(f"this CPU lacks the instructions of {level}")
    flags = (f"-march={level}",) if level else ()
    functions = native._built(shutil.which(os.environ.get("CXX") or "c++"), (*flags, "-Wno-unknown-pragmas"))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        name = str(dtype).removeprefix("torch.")
        model = load(tmp_path / name, "llama3", name)
        assert_same(model, dtype, functions["forward", dtype], tolerance)


def test_what_it_does_not_serve_the_model_does(tmp_path):
    model = load(tmp_path, "gpt2-untied", "float32")  # its MLP is 72 wide, not a multiple of 16
    assert NativeForward.unserved(model, cache_for(model, torch.float32))
    normed = load(tmp_path / "normed", "qwen3", "float32")  # heads are 20 wide and have norms
    assert NativeForward.unserved(normed, cache_for(normed, torch.float32))
    served = load(tmp_path / "served", "llama2", "float32")
    assert not NativeForward.unserved(served, cache_for(served, torch.float32))
    assert NativeForward.unserved(served, cache_for(served, torch.bfloat16))
    heads = {"hidden_size": 160, "num_heads": 32, "num_kv_heads": 32, "head_dim": 5}
    narrow = GPT2(replace(model.config, intermediate_size=64, **heads))
    assert not NativeForward.unserved(narrow, cache_for(narrow, torch.float32))
    assert NativeForward.unserved(narrow.to(torch.bfloat16), cache_for(narrow, torch.bfloat16))  # 5 is odd
    assert NativeForward.unserved(served.to(torch.float16), cache_for(served, torch.float16))


class Doubled(Llama):
    """A class with a Llama's weights and another ``forward``."""

    def forward(self, *args, **named):
        return 2 * super().forward(*args, **named)


def test_a_model_of_another_class_is_not_computed_as_one_of_the_known_families(tmp_path, monkeypatch):
    model = load(tmp_path, "llama2", "float32")
    cache = cache_for(model, torch.float32)
    assert not NativeForward.unserved(model, cache)
    model.__class__ = Doubled
    assert NativeForward.unserved(model, cache)
    with pytest.raises(KeyError):
        NativeForward(model, cache)

    def load_doubled(*args, **named):
        loaded = load_model(*args, **named)
        loaded.model.__class__ = Doubled
        return loaded

    monkeypatch.setattr("minipaged.models.loader.load_model", load_doubled)
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", attention="native", num_blocks=64)
    assert llm.engine.runner.forward is llm.engine.runner.model, "the engine should use the model's forward"
    assert llm.generate([[1, 7, 9]], SamplingParams(temperature=0, max_tokens=2))[0].finished


def test_looking_at_attention_is_left_to_the_model(tmp_path, monkeypatch):
    save_llama(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", attention="native", num_blocks=8)
    engine = llm.engine
    engine.add_request("a", [1, 7, 9], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    engine.step()
    before = [tensor.clone() for tensor in engine.runner.kv_cache.k]
    monkeypatch.setattr(NativeForward, "run", lambda *_: pytest.fail("the C++ step returns no attention weights"))
    (seq_id,) = engine.block_tables()
    assert attention_view.attention(engine, seq_id, 2).shape[-1] == 3
    after = engine.runner.kv_cache.k
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "the KV cache changed"


def test_an_engine_uses_it_unless_attention_is_torchs(tmp_path):
    save_llama(tmp_path)
    prompts = [[1, 7, 9], list(range(3, 40)), [5] * 17]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = []
    for attention in ("native", "torch"):
        llm = LLM(str(tmp_path), device="cpu", dtype="float32", attention=attention, num_blocks=64)
        assert isinstance(llm.engine.runner.forward, NativeForward) == (attention == "native")
        found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert found[0] == found[1]


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux requires a request for AMX")
def test_where_the_system_does_not_let_amx_be_used_other_instructions_serve(tmp_path, monkeypatch):
    """A sandbox may refuse AMX although the CPU has it; its instructions would then kill the process."""
    source = tmp_path / "native.cpp"
    source.write_text("#include <sys/syscall.h>\n#undef SYS_arch_prctl\n#define SYS_arch_prctl -1\n" + (
        f'#include "{native.SOURCE}"\n'))  # fmt: skip
    monkeypatch.setattr(native, "SOURCE", source)
    functions = native._built(shutil.which(os.environ.get("CXX") or "c++"), ("-march=native", "-Wno-unknown-pragmas"))
    model = load(tmp_path / "model", "llama3", "bfloat16")
    assert_same(model, torch.bfloat16, functions["forward", torch.bfloat16], 0.06)
