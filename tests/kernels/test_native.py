"""The C++ kernels against their oracles, and the behaviour where they cannot be compiled."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minipaged.errors import InvalidConfig
from minipaged.kernels import backend, native, reference
from minipaged.kernels.backend import choose, kernels_for

CPU = torch.device("cpu")
NUMBERS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Asserts equality up to the order of a sum: a bfloat16 may be rounded to its neighbour."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    exact = ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if exact else 2e-2, atol=2e-5 if exact else 2e-2)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if lacking := native.missing():
        pytest.skip(lacking)


def pages(num_seqs, blocks, kv_heads, head_dim, dtype, size=16):
    """A KV cache with NaN in unused slots, scattered block tables, and context lengths that end inside blocks."""
    torch.manual_seed(0)
    k, v = (torch.randn(num_seqs * blocks + 3, size, kv_heads, head_dim).to(dtype) for _ in range(2))
    tables = torch.randperm(num_seqs * blocks + 3)[: num_seqs * blocks].view(num_seqs, blocks)
    lens = torch.randint(1, blocks * size + 1, (num_seqs,))
    for table, length in zip(tables, lens.tolist(), strict=True):
        slots = (table[:, None] * size + torch.arange(size)).flatten()[length:]
        k.view(-1, kv_heads, head_dim)[slots] = v.view(-1, kv_heads, head_dim)[slots] = float("nan")
    return k, v, tables, lens


@NUMBERS
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 4, 32), (9, 3, 64), (4, 4, 128), (6, 1, 20)])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_decode_attention_is_the_references_whatever_lies_in_dead_slots(dtype, heads, kv_heads, head_dim, window):
    k, v, tables, lens = pages(5, 4, kv_heads, head_dim, dtype)
    fused = torch.randn(5, (heads + 2 * kv_heads) * head_dim).to(dtype)  # as in a model, queries are parts of rows
    q = fused[:, : heads * head_dim].unflatten(-1, (heads, head_dim))
    arguments = (q, k, v, tables, lens, head_dim**-0.5, window)
    close(native.paged_decode(*arguments), reference.paged_decode(*arguments))


def test_scores_too_large_for_an_exponential_do_not_overflow():
    k, v, tables, lens = pages(3, 2, 2, 32, torch.float32)
    arguments = (torch.randn(3, 4, 32) * 500, k, v, tables, lens, 1.0)
    close(native.paged_decode(*arguments), reference.paged_decode(*arguments))


def test_what_they_do_not_serve_goes_to_the_reference():
    k, v, tables, lens = pages(2, 2, 2, 32, torch.float16)
    arguments = (torch.randn(2, 4, 32).half(), k, v, tables, lens, 1.0)
    assert torch.equal(native.paged_decode(*arguments), reference.paged_decode(*arguments))


def test_without_a_compiler_torch_does_it_and_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.missing.cache_clear()
    native._library.cache_clear()
    try:
        name, why = choose("auto", CPU)
        assert name == "torch" and "no C++ compiler" in why and kernels_for("auto", CPU) is backend.TORCH
        with pytest.raises(InvalidConfig, match='no C.. compiler.*choose "torch" or "auto"'):
            choose("native", CPU)
    finally:
        native.missing.cache_clear()
        native._library.cache_clear()


def test_on_a_gpu_they_are_refused():
    with pytest.raises(InvalidConfig, match="it is for a CPU, and this is cuda"):
        choose("native", torch.device("cuda"))


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A compiler that takes no time: it writes a line to its output, and notes each call in a file."""
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor last; do :; done\necho "made by the stub" > "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(script), lambda: len((tmp_path / "calls").read_text().splitlines())


@pytest.mark.parametrize("damage", [b"", b"made by", b"something else, of the same kind\n", None])
def test_a_damaged_library_in_the_cache_is_built_again(stub, damage):
    compiler, calls = stub
    path = native._compiled(compiler, ("-O1",))
    content = path.read_bytes()
    assert content.startswith(b"made by") and native._compiled(compiler, ("-O1",)) == path and calls() == 2
    path.unlink() if damage is None else path.write_bytes(damage)
    again = native._compiled(compiler, ("-O1",))
    assert again.read_bytes().startswith(b"made by the stub") and calls() == 4
    assert sorted(again.parent.iterdir()) == [again], "the damaged file and the scratch folder should be gone"


def test_an_interrupted_build_leaves_nothing_to_load(stub, tmp_path, monkeypatch):
    compiler, calls = stub
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(native.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        native._compiled(compiler, ())
    assert list((tmp_path / "cache" / "minipaged").iterdir()) == []
    assert native._compiled(compiler, ()).exists()


def test_processes_that_build_at_once_do_not_disturb_each_other(stub):
    compiler, calls = stub
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: native._compiled(compiler, ()), range(4)))
    assert all(path.exists() and path.stem.endswith(native._digest(path)) for path in paths)
