"""Virtual memory mapped explicitly: what each place shows, its cost in addresses and pages, and its release."""

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged import LLM, EngineConfig, SamplingParams
from minipaged.core.plan import Copy
from minipaged.errors import InvalidConfig, StepFailed
from minipaged.features.swap.swap_runner import SwapSpace
from minipaged.features.vattention import cuda_memory, virtual_memory
from minipaged.features.vattention import slot_attention as contiguous
from minipaged.features.vattention.cuda_memory import CudaMemory
from minipaged.features.vattention.page_memory import HostMemory
from minipaged.features.vattention.virtual_memory import Layout, VirtualKVCache
from minipaged.features.vattention.virtual_tables import PageMap, PageMaps
from minipaged.kernels import reference
from tests.features.fake_driver import FakeDriver

PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")
GiB = 1 << 30


@pytest.fixture(params=["host", "cuda on a fake driver"])
def make_memory(request, monkeypatch):
    """Both implementations of `PageMemory`; the CUDA one calls a fake driver on top of mmap."""
    if request.param == "host":
        yield HostMemory
        return
    driver = FakeDriver(PAGE)
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield lambda *sizes: CudaMemory(*sizes, CPU)
    gc.collect()
    assert not driver.held(), "not all driver memory was released"


def read(memory, place):
    return memory.space[place * memory.page_bytes : (place + 1) * memory.page_bytes]


def fill(memory, page, value):
    memory.pool[page * memory.page_bytes : (page + 1) * memory.page_bytes] = value


# --- pages and places ---------------------------------------------------------------------------------------------


def test_a_place_shows_its_page_and_two_places_may_show_the_same(make_memory):
    memory = make_memory(2 * PAGE, 3, 10)
    for page in range(3):
        fill(memory, page, 10 + page)
    memory.map(4, 0, 3)
    memory.map(9, 1, 1)
    assert [read(memory, place).unique().tolist() for place in (4, 5, 6, 9)] == [[10], [11], [12], [11]]
    read(memory, 9)[7] = 99  # written through one view …
    assert read(memory, 5)[7] == 99 and memory.pool[2 * PAGE + 7] == 99  # … and read through the others
    assert memory.mapped == {4, 5, 6, 9}


def test_what_is_unmapped_keeps_its_bytes_and_may_be_mapped_anew(make_memory):
    memory = make_memory(PAGE, 2, 4)
    fill(memory, 0, 1)
    fill(memory, 1, 2)
    memory.map(0, 0, 2)
    memory.unmap(0, 2)
    memory.unmap(0, 2)  # a second time is harmless
    assert memory.mapped == set() and memory.pool[0] == 1
    memory.map(3, 0, 1)
    memory.map(3, 1, 1)  # replaces page 0
    assert read(memory, 3)[0] == 2 and memory.mapped == {3}


def test_views_keep_the_memory_and_nothing_else_does(make_memory):
    memory = make_memory(PAGE, 2, 4)
    memory.map(2, 1, 1)
    view = memory.space.view(torch.float32).view(4, -1)[2]
    pool = memory.pool
    del memory
    gc.collect()
    view[0] = 2.5
    assert pool.view(torch.float32)[PAGE // 4] == 2.5


def addresses(needle: str = "") -> int:
    return sum(needle in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_far_more_can_be_reserved_than_there_is_memory():
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    places = 16 * free // PAGE
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * PAGE  # noqa: E731
    before = resident()
    memory = HostMemory(PAGE, 4, places)
    assert memory.space.numel() > 15 * free
    memory.map(places - 1, 3, 1)
    read(memory, places - 1)[0] = 1
    assert resident() - before < 1 << 20


TOUCHES = {
    "space[0].item()": True,  # never mapped
    "space[0] = 1": True,
    "memory.map(0, 0, 1); space[PAGE - 1] = 1; space[0].item()": False,
    "memory.map(0, 0, 1); space[PAGE].item()": True,  # the next place
    "memory.map(0, 0, 1); memory.unmap(0, 1); space[0].item()": True,
}
TOUCH_ALL = """
import os, resource, sys
from minipaged.features.vattention.page_memory import HostMemory
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
PAGE = int(sys.argv[1])
for touch in sys.argv[2:]:
    memory = HostMemory(PAGE, 1, 4)
    space = memory.space
    child = os.fork()
    if child == 0:
        exec(touch)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_is_not_mapped_cannot_be_touched():
    command = [sys.executable, "-c", TOUCH_ALL, str(PAGE), *TOUCHES]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [code == str(-signal.SIGSEGV) for code in told] == list(TOUCHES.values()), told
    assert set(told) == {"0", str(-signal.SIGSEGV)}


def test_a_mapping_that_the_system_refuses_is_an_error():
    memory = HostMemory(PAGE, 2, 4)
    with pytest.raises(OSError, match="mmap of 1 page-groups"):
        memory._mapping.mmap(0, 1, mmap.PROT_READ, mmap.MAP_SHARED, fd=-1)
    with pytest.raises(OSError, match="mmap of"):
        HostMemory(PAGE, 1, 1 << 40)  # larger than the address space


# --- the cache ----------------------------------------------------------------------------------------------------


def make_cache(tensor_slicing=False, num_layers=3, num_blocks=6, slots=4, max_len=40, dtype=torch.float32):
    layout = Layout(num_layers, 2, 32, dtype, tensor_slicing)
    size = layout.block_size(None, slots, max_len, CPU)
    cache = VirtualKVCache(layout, num_blocks, size, CPU, max_num_seqs=slots, max_model_len=max_len)
    return cache, size


def remap(cache, *maps, unmaps=()):
    plan = PageMaps(maps=[PageMap(*m) for m in maps], unmaps=[PageMap(*m, 0) for m in unmaps])
    cache.remap(plan)
    assert plan.done


SLICING = pytest.mark.parametrize("tensor_slicing", [False, True], ids=["one tensor a layer", "tensor slicing"])


@SLICING
def test_a_slot_shows_the_blocks_of_every_layer_in_order(tensor_slicing):
    cache, size = make_cache(tensor_slicing)
    assert [tuple(x.shape) for x in (*cache.k, *cache.v)] == [(6, size, 2, 32)] * 6
    assert {tuple(x.shape) for x in (*cache.k_slots, *cache.v_slots)} == {(4, -(-40 // size) * size, 2, 32)}
    slots = torch.arange(6 * size)
    for layer in range(3):
        k = torch.randn(6 * size, 2, 32)
        reference.store_kv(k, -k, cache.k[layer], cache.v[layer], slots)
    remap(cache, (1, 0, 4), (1, 1, 2), (1, 2, 3), (3, 0, 2))
    for layer in range(3):
        for pool, virtual in ((cache.k[layer], cache.k_slots[layer]), (cache.v[layer], cache.v_slots[layer])):
            assert torch.equal(virtual[1, : 3 * size], pool[[4, 2, 3]].flatten(0, 1))
            assert torch.equal(virtual[3, :size], pool[2])
    assert not torch.equal(cache.k[0], cache.k[1]) and not torch.equal(cache.k[0], cache.v[0])


@SLICING
def test_copies_and_swaps_show_in_the_slots(tensor_slicing):
    cache, size = make_cache(tensor_slicing)
    for layer in range(3):
        for block in range(6):
            cache.k[layer][block], cache.v[layer][block] = block + layer / 10, -block - layer / 10
    remap(cache, (0, 0, 5), (0, 1, 1))
    space = SwapSpace(cache, 4)
    space.swap_out([Copy(3, 2)])
    cache.copy([Copy(2, 5)])
    space.swap_in([Copy(2, 1)])
    for layer in range(3):
        assert cache.k_slots[layer][0, :size].unique().item() == pytest.approx(2 + layer / 10)
        assert cache.v_slots[layer][0, size : 2 * size].unique().item() == pytest.approx(-3 - layer / 10)


@SLICING
def test_neighbours_are_mapped_by_one_call_per_tensor(tensor_slicing):
    cache, _ = make_cache(tensor_slicing)
    calls = []
    real = cache.memory.map
    cache.memory.map = lambda *call: (calls.append(call), real(*call))
    remap(cache, (0, 0, 1), (0, 1, 2), (0, 2, 4), (1, 0, 5))
    assert [count for _, _, count in calls] == ([2, 2] if tensor_slicing else [2] * 6) + [1] * 2 * (len(calls) // 3)
    assert len(calls) == 3 * (2 if tensor_slicing else 6)
    assert len(cache.memory.mapped) == 4 * (2 if tensor_slicing else 6)


def test_reserved_physical_and_mapped_bytes_are_told():
    cache, size = make_cache(num_layers=2, num_blocks=5, slots=100, max_len=10_000)
    block = 2 * 2 * size * 2 * 32 * 4
    assert cache.use.reserved == 100 * -(-10_000 // size) * block > 100 * cache.use.physical
    assert cache.use.physical == 5 * block and cache.use.mapped == 0
    remap(cache, (7, 0, 0), (8, 0, 0), (8, 1, 1))
    assert cache.use.mapped == 3 * block
    remap(cache, unmaps=[(8, 1)])
    assert cache.use.mapped == 2 * block


def test_what_fails_in_the_background_is_raised_before_the_next_maps():
    cache, _ = make_cache()
    plan = PageMaps(ahead=[PageMap(0, 0, 0)], background=True)
    cache.memory.map = lambda *call: (_ for _ in ()).throw(OSError("no more"))
    cache.remap(plan)
    following = PageMaps()
    with pytest.raises(OSError, match="no more"):
        cache.remap(following)
    assert not plan.done and not following.done
    cache.remap(following)
    assert following.done


def test_nothing_is_mapped_while_the_background_still_maps():
    cache, _ = make_cache()
    order = []

    def slowly(*call):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        order.append(call[0])

    cache.memory.map = slowly
    cache.remap(PageMaps(ahead=[PageMap(3, 0, 0)], background=True))
    cache.remap(PageMaps(maps=[PageMap(0, 0, 0)]))
    assert len(order) == 12 and sorted(order[6:]) == sorted(cache._place(tensor, 0, 0) for tensor in range(6))


def test_an_interrupted_wait_does_not_let_the_next_step_begin():
    cache, _ = make_cache()
    gate, real = threading.Event(), cache.memory.map
    cache.memory.map = lambda *call: (gate.wait(10), real(*call))
    cache.remap(PageMaps(ahead=[PageMap(0, 0, 0)], background=True))
    future = cache._ahead
    cache._ahead = SimpleNamespace(result=lambda: signal.raise_signal(signal.SIGINT), done=future.done)
    with pytest.raises(KeyboardInterrupt):
        cache.remap(PageMaps())
    assert cache._ahead is not None
    cache._ahead = future
    gate.set()
    cache.remap(PageMaps())
    assert len(cache.memory.mapped) == 6 and cache._ahead is None


def test_pages_mapped_in_the_background_are_there_when_the_next_step_begins():
    cache, size = make_cache(num_blocks=6)
    for page in range(6):
        cache.k[0][page] = page
    for step in range(200):
        page = step % 6
        cache.remap(PageMaps(ahead=[PageMap(step % 4, 0, page)], background=True))
        cache.wait()
        assert cache.k_slots[0][step % 4, 0, 0, 0] == page


# --- attention ----------------------------------------------------------------------------------------------------


@SLICING
@pytest.mark.parametrize("window", [None, 1, 5, 17, 100])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_on_slots_equals_attention_on_blocks(tensor_slicing, window, groups):
    torch.manual_seed(0)
    cache, size = make_cache(tensor_slicing, num_blocks=12, slots=5, max_len=3 * size_of(tensor_slicing))
    cache.k[1][:], cache.v[1][:] = torch.nan, torch.nan  # as left by an earlier owner
    tables = [[7, 3, 9], [0, 5, 0], [2, 0, 0], [11, 10, 1]]
    context_lens, query_lens = [2 * size + 3, size + 1, 4, 3 * size], [1, 1, 4, size + 5]
    for table, length in zip(tables, context_lens, strict=True):
        where = torch.tensor([table[i // size] * size + i % size for i in range(length)])
        reference.store_kv(torch.randn(length, 2, 32), torch.randn(length, 2, 32), cache.k[1], cache.v[1], where)
    slots = [4, 0, 1, 2]
    used = [(slot, table[: -(-n // size)]) for slot, table, n in zip(slots, tables, context_lens, strict=True)]
    remap(cache, *((slot, i, page) for slot, pages in used for i, page in enumerate(pages)))
    q = torch.randn(sum(query_lens), 2 * groups, 32)
    args = (32**-0.5, window)
    out = contiguous.attention(q, cache.k_slots[1], cache.v_slots[1], slots, context_lens, query_lens, *args)
    pool = (cache.k[1], cache.v[1], torch.tensor(tables))
    decode = reference.paged_decode(q[:2], *pool[:2], pool[2][:2], torch.tensor(context_lens[:2]), *args)
    prefill = reference.paged_prefill(q[2:], *pool[:2], pool[2][2:], context_lens[2:], query_lens[2:], *args)
    torch.testing.assert_close(out, torch.cat([decode, prefill]), rtol=1e-5, atol=1e-5)
    assert not out.isnan().any()


def size_of(tensor_slicing):
    return Layout(3, 2, 32, torch.float32, tensor_slicing).block_size(None, 5, 1000, CPU)


# --- settings -----------------------------------------------------------------------------------------------------


def test_page_groups_must_fill_pages_and_the_error_names_sizes_that_do(monkeypatch):
    monkeypatch.setattr(virtual_memory, "page_size", lambda device: 4096)
    layout = Layout(4, 4, 32, torch.float32)  # 512 bytes per token
    assert [layout.block_size(size, 8, 100, CPU) for size in (None, 8, 16, 24)] == [16, 8, 16, 24]
    for size in (1, 7, 12):
        with pytest.raises(InvalidConfig, match=r"multiple of 8 here \(8, 16, 24, …\)"):
            layout.block_size(size, 8, 100, CPU)
    sliced = Layout(4, 4, 32, torch.float32, tensor_slicing=True)
    assert sliced.block_size(2, 8, 100, CPU) == 2, "four layers fill a page with 2 tokens, not 8"
    odd = Layout(3, 1, 12, torch.float32)  # 48 bytes: 256 tokens fill 3 pages
    assert odd.block_size(None, 8, 100, CPU) == 256


@given(
    token_bytes=st.integers(1, 5000).map(lambda heads: 4 * heads), max_num_seqs=st.integers(1, 100),
    max_len=st.integers(2, 5000), limit=st.integers(10, 100_000),
)  # fmt: skip
def test_the_default_is_the_smallest_block_size_that_works(token_bytes, max_num_seqs, max_len, limit):
    layout = Layout(2, token_bytes // 4, 1, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(virtual_memory, "page_size", lambda device: 4096)
        patch.setattr(virtual_memory, "_most_mappings", lambda device: limit)

        def works(size):
            try:
                return layout.block_size(size, max_num_seqs, max_len, CPU) == size
            except InvalidConfig:
                return False

        if 4 * max_num_seqs > limit:
            assert not works(None)
            return
        size = layout.block_size(None, max_num_seqs, max_len, CPU)
        assert size * token_bytes % 4096 == 0 and 4 * max_num_seqs * -(-max_len // size) <= limit
        assert works(size) and not any(works(smaller) for smaller in range(max(16, size - 3000), size))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_runs_are_the_maps_in_their_order(maps):
    runs = list(virtual_memory._runs(PageMap(*m) for m in maps))
    assert [(slot, logical + i, page + i) for slot, logical, page, count in runs for i in range(count)] == maps
    ends = [(slot, logical + count, page + count) for slot, logical, page, count in runs]
    assert all(end != run[:3] for end, run in zip(ends, runs[1:], strict=False)), "two runs could be joined"


def test_on_pages_of_2_mib_slicing_divides_the_tokens_of_a_page_group_by_the_layers(monkeypatch):
    """vAttention, Table 8: Llama-3-8B in half precision."""
    monkeypatch.setattr(virtual_memory, "page_size", lambda device: 2 << 20)
    shape = (32, 8, 128, torch.float16)
    cuda = torch.device("cuda")
    assert Layout(*shape).block_size(None, 256, 8192, cuda) == 1024
    assert Layout(*shape, tensor_slicing=True).block_size(None, 256, 8192, cuda) == 32


def test_more_mappings_than_the_system_allows_are_refused(monkeypatch):
    monkeypatch.setattr(virtual_memory, "page_size", lambda device: 4096)
    monkeypatch.setattr(virtual_memory, "_most_mappings", lambda device: 1000)
    layout = Layout(4, 4, 32, torch.float32)
    with pytest.raises(InvalidConfig, match=r"may need 4096 memory mappings.*1000.*block_size of 72 or more"):
        layout.block_size(16, 8, 1024, CPU)
    size = layout.block_size(None, 8, 1024, CPU)
    assert size == 72 and 8 * 8 * -(-1024 // size) <= 1000
    with pytest.raises(InvalidConfig, match="lower max_num_seqs"):
        layout.block_size(None, 200, 1024, CPU)


@pytest.mark.parametrize(("device", "system"), [("mps", "darwin"), ("cpu", "darwin"), ("cpu", "win32")])
def test_other_systems_are_refused(monkeypatch, device, system):
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(InvalidConfig, match=r"works on Linux \(CPU\) and CUDA"):
        virtual_memory.page_size(torch.device(device))


def test_an_llm_refuses_before_it_loads_a_model(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InvalidConfig, match=r"works on Linux \(CPU\) and CUDA"):
        LLM("no such model anywhere", device="cpu", memory="vattention")


def test_cuda_without_the_bindings_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InvalidConfig, match="pip install cuda-bindings"):
        virtual_memory.page_size(torch.device("cuda"))


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_slicing": True},
        {"mapping": "sync"},
        {"memory": "vattention", "mapping": "lazy"},
        {"memory": "vattention", "tensor_slicing": 1},
        {"memory": "vattention", "block_size": 0},
        {"memory": "vattention", "attention": "flex"},
        {"memory": "vattention", "kv_dtype": "int8"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidConfig):
        EngineConfig(**settings)


# --- whole engines ------------------------------------------------------------------------------------------------


def tiny(llm, **settings):
    config = EngineConfig(**({"memory": "vattention", "num_blocks": 40, "max_num_seqs": 4} | settings), device="cpu")
    return llm.build_engine(config)


@pytest.fixture(scope="module")
def llm():
    return LLM("tiny", device="cpu", dtype="float32", num_blocks=8)


def test_the_error_reaches_whoever_builds_an_engine(llm):
    with pytest.raises(InvalidConfig, match="multiple of"):
        tiny(llm, block_size=1)


def test_default_settings_work_and_tell_their_block_size(llm):
    engine = llm.build_engine(EngineConfig(memory="vattention", device="cpu"))
    assert engine.config.block_size == engine.memory.block_size == engine.started_event().block_size == 16
    assert engine.runner.kv_cache.use.reserved >= engine.runner.kv_cache.use.physical > 0


def test_engines_leave_neither_addresses_nor_files_behind(llm):
    def use_one(i):
        engine = tiny(llm, mapping=("sync", "eager", "async")[i % 3], tensor_slicing=i % 2 == 0)
        engine.add_request("a", [5] * 20, SamplingParams(max_tokens=4, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()

    def held():
        gc.collect()
        return addresses("minipaged-kv"), len(os.listdir("/proc/self/fd"))

    use_one(0)
    before, threads = held(), addresses()
    for i in range(50):
        use_one(i)
    assert held() == before and before[0] == 0
    assert addresses() - threads < 50, "a reservation or a thread was leaked"


def test_a_step_whose_mapping_fails_takes_its_requests_along_and_the_engine_goes_on(llm):
    engine = tiny(llm)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    engine.add_request("first", [7] * 30, params)
    engine.step()
    memory, real = engine.runner.kv_cache.memory, engine.runner.kv_cache.memory.map

    def refuse(*call):
        raise OSError("no more")

    memory.map = refuse
    engine.add_request("second", [8] * 30, params)
    with pytest.raises(StepFailed, match="no more"):
        while True:
            engine.step()
    memory.map = real
    engine.add_request("third", [9] * 30, params)
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check()
    paged = llm.build_engine(EngineConfig(num_blocks=40, device="cpu"))
    paged.add_request("third", [9] * 30, params)
    while paged.has_unfinished():
        truth = paged.step()
    assert done["third"].outputs[0].token_ids == truth[0].outputs[0].token_ids


def test_on_the_fake_driver_an_engine_answers_as_on_the_cpu(llm, monkeypatch):
    driver = FakeDriver(PAGE)
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, n=2)
    answers = []
    for make in (virtual_memory._page_memory, lambda device, *sizes: CudaMemory(*sizes, device)):
        monkeypatch.setattr(virtual_memory, "_page_memory", make)
        engine = tiny(llm, num_blocks=12)
        for i in range(5):
            engine.add_request(str(i), [5 + i] * (10 + i), params)
        done = {}
        while engine.has_unfinished():
            done |= {o.request_id: [s.token_ids for s in o.outputs] for o in engine.step() if o.finished}
        answers.append(done)
    assert driver.calls["cuMemUnmap"] > 20 and answers[0] == answers[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: memory is mapped by its driver")
@SLICING
def test_on_cuda_a_place_shows_its_page(tensor_slicing):
    pytest.importorskip("cuda.bindings.driver", reason="needs the package cuda-bindings")
    device = torch.device("cuda", torch.cuda.current_device())
    layout = Layout(2, 2, 32, torch.float16, tensor_slicing)
    size = layout.block_size(None, 3, 2 * layout.block_size(None, 3, 100, device), device)
    cache = VirtualKVCache(layout, 4, size, device, max_num_seqs=3, max_model_len=2 * size)
    for page in range(4):
        cache.k[1][page] = page
    remap(cache, (0, 0, 3), (0, 1, 1), (2, 0, 1))
    assert cache.k_slots[1][0, :, 0, 0].unique().tolist() == [1, 3]
    cache.k_slots[1][2, 5] = 9
    assert cache.k_slots[1][0, size + 5, 0, 0] == 9
