"""Every kernel compiled for absent GPUs: registers must not spill, and matrix products must use tensor cores."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton but for Linux")

from typer.testing import CliRunner  # noqa: E402

from minipaged import cli  # noqa: E402
from minipaged.errors import InvalidConfig  # noqa: E402
from minipaged.kernels import backend, report  # noqa: E402
from minipaged.kernels.paged_decode import MAX_SPLITS, splits_of  # noqa: E402
from minipaged.kernels.paged_prefill import _tiles  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # half a minute on an idle machine, more on a busy one

# Each branch of each kernel: windows, splits, int8 caches, head dimensions with and without padding, both widths.
CHOSEN = [
    "store bf16 llama",
    "rope_store fp16 smol",
    "decode bf16 llama",
    "decode fp16 odd",
    "decode split bf16 smol",
    "decode split fp32 gpt2",
    "prefill bf16 llama",
    "prefill window fp16 odd",
    "prefill fp32 gpt2",
    "store int8 llama",
    "decode int8 llama",
    "prefill int8 llama",
    "add_norm bf16",
    "copy",
]


@pytest.fixture(scope="module")
def compiled():
    variants = {variant.name: variant for variant in report.variants()}
    made = list(report.compile_all(variants[name] for name in CHOSEN))
    print(report.HEADER, *map(report.line, made), sep="\n")
    return made


def test_every_kernel_compiles_for_both_targets_and_nothing_spills(compiled):
    assert {(c.kernel, c.capability) for c in compiled} == {(k, sm) for k in report.KERNELS for sm in report.TARGETS}
    assert not [report.line(c) for c in compiled if c.main and c.spilled]


def test_products_are_on_tensor_cores_and_loads_are_wide_and_overlap_them(compiled):
    attention = [c for c in compiled if c.kernel in ("_decode_kernel", "_prefill_kernel")]
    assert {bool(c.tensor_cores) for c in attention if "fp32" not in c.variant} == {True}
    assert all(c.async_copies for c in attention)
    llama = [c for c in attention if c.variant.endswith("16 llama")]
    assert llama and all("LDGSTS.E.BYPASS.128" in c.sass for c in llama), "loads are not 16 bytes per thread"
    hopper = [c for c in attention if c.variant == "prefill bf16 llama" and c.capability == 90]
    assert "wgmma" in hopper[0].ptx, "Hopper's matrix instructions are not used"


def test_a_program_fits_into_shared_memory_and_registers(compiled):
    assert all(c.shared <= 163 * 1024 for c in compiled), "more shared memory than an A100 has for a program"
    assert all(0 < c.registers <= 255 for c in compiled)


def kernels_launched(name):
    variant = next(variant for variant in report.variants() if variant.name == name)
    return [(launch.source.name, launch.source.hash(), launch.options) for launch in report.launches(variant)]


def test_nothing_compiles_anew_for_another_length():
    """Values that change in every step must not be part of a kernel's compilation key."""
    decode, prefill = report.ATTENTION["decode"], report.ATTENTION["prefill"]
    for launch in (decode, prefill):
        keys = set()
        for blocks in (1, 15, 16, 100):
            with pytest.MonkeyPatch.context() as patch:
                zeros = torch.zeros

                def other(*shape, blocks=blocks, zeros=zeros, **named):
                    # Rows 1 and 2 of a block table; they start at a multiple of 16 bytes, or not.
                    table = named.get("dtype") is torch.int64
                    return zeros(3, blocks, **named)[1:] if table else zeros(*shape, **named)

                patch.setattr(torch, "zeros", other)
                variant = report.Variant("", lambda launch=launch: launch(torch.float16, torch.float16, 8, 2, 64))
                keys.add(tuple(found.source.hash() for found in report.launches(variant)))
        assert len(keys) == 1


@pytest.mark.parametrize("longest", [1, 15, 16, 17, 1000, 32768, 10**6])
@pytest.mark.parametrize("programs", [1, 8, 100, 10**5])
@pytest.mark.parametrize("keys", [16, 64, 128])
def test_there_are_no_more_splits_than_there_is_work_and_than_fill_the_gpu(longest, programs, keys):
    splits = splits_of(longest, keys, programs, processors=132)
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or (splits * keys * 4 <= longest and splits * programs <= 4 * 132)


def test_one_long_sequence_fills_the_gpu():
    assert splits_of(32768, 64, programs=8, processors=132) * 8 >= 4 * 132 * 0.9


def test_tiles_of_queries_cover_every_query_once():
    tiles = _tiles((7, 20, 33), (7, 5, 1), 3, torch.device("cpu")).tolist()
    assert [first for _, _, _, first in tiles] == [32, 18, 15, 6, 3, 0], "tiles with the most work come first"
    tiles.sort(key=lambda tile: tile[1])
    rows = [row + i for _, row, count, _ in tiles for i in range(count)]
    assert rows == list(range(13))
    assert [(seq, position) for seq, _, _, position in tiles] == [(0, 0), (0, 3), (0, 6), (1, 15), (1, 18), (2, 32)]


def run(*args):
    result = CliRunner().invoke(cli.app, ["kernels", "report", *args])
    return result.exit_code, result.output


def test_the_command_shows_the_table_and_the_machine_code():
    code, out = run("copy", "--ptx", "--sass")
    assert code == 0, out
    lines = [line.split()[:3] for line in out.splitlines()]
    assert ["copy", "copy", "sm_80"] in lines and ["copy", "copy", "sm_90"] in lines
    assert out.count(".visible .entry _copy_kernel") == 2 and "STG.E" in out


def test_the_command_says_what_is_wrong(monkeypatch):
    assert run("no such variant")[0] == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InvalidConfig, match="unset it"):
        backend.require_compiler()
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    with pytest.raises(InvalidConfig, match="not installed"):
        backend.require_compiler()
