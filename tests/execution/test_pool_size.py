"""How many blocks the pool gets: what the machine, its control groups and the user allow."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from minipaged import LLM, EngineConfig
from minipaged.config import num_bytes
from minipaged.errors import InvalidConfig
from minipaged.execution import pool_size
from minipaged.execution.pool_size import blocks_that_fit, free_memory

CPU = torch.device("cpu")
MACHINE = 8 << 30  # bytes free


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """``cgroups(own, files)`` fakes a machine: the lines of /proc/self/cgroup, and files under /sys/fs/cgroup."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    monkeypatch.setattr(pool_size, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(pool_size, "OWN_CGROUPS", tmp_path / "own")

    def fake(own, files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return free_memory(CPU)

    return fake


def v2(folder, limit, used, inactive=0, **more):
    files = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {inactive}"} | more
    return {f"{folder}{name}": content for name, content in files.items()}


def v1(folder, limit, used, inactive=0):
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"memory/{folder}{name}": content for name, content in files.items()}


GIB, UNLIMITED = 1 << 30, 9223372036854771712  # v1 writes the largest number of pages
V1 = "12:cpu,cpuacct:/a\n4:memory:/{}\n1:name=systemd:/a\n0::/a\n"
CASES = {
    "no control groups": ("", {}, MACHINE),
    "lines of another form": ("nonsense\n0:\n", {}, MACHINE),
    "a use that is no number": ("0::/a\n", v2("a/", 3 * GIB, "much"), 3 * GIB),
    "v2, no limit": ("0::/a\n", v2("a/", "max", 5), MACHINE),
    "v2, a limit": ("0::/a\n", v2("a/", 3 * GIB, GIB), 2 * GIB),
    "v2, a limit above the machine's memory": ("0::/a\n", v2("a/", 64 * GIB, GIB), MACHINE),
    "v2, cached files are dropped": ("0::/a\n", v2("a/", 3 * GIB, 2 * GIB, GIB), 2 * GIB),
    "v2, a limit above": ("0::/a/b/c\n", v2("a/", 2 * GIB, GIB) | v2("a/b/c/", "max", 0), GIB),
    "v2, the tightest of several": ("0::/a/b\n", v2("a/", 6 * GIB, 0) | v2("a/b/", 5 * GIB, 0), 5 * GIB),
    "v2, throttled": ("0::/a\n", v2("a/", "max", GIB, **{"memory.high": 2 * GIB}), GIB),
    "v2, a container that is its own root": ("0::/\n", v2("", 3 * GIB, GIB), 2 * GIB),
    "v2, a path from outside": ("0::/../../outside\n", v2("", 3 * GIB, GIB), 2 * GIB),
    "v2, used up": ("0::/a\n", v2("a/", GIB, 2 * GIB), 0),
    "v1, no limit": (V1.format("a"), v1("a/", UNLIMITED, 5), MACHINE),
    "v1, a limit": (V1.format("a"), v1("a/", 3 * GIB, GIB), 2 * GIB),
    "v1, nested": (V1.format("a/b"), v1("a/", 2 * GIB, GIB, GIB // 2) | v1("a/b/", UNLIMITED, 0), 3 * GIB // 2),
    "v1, a container": (V1.format("docker/abc"), v1("", 3 * GIB, GIB), 2 * GIB),
    "v1, another group's limit": (V1.format("a"), v1("b/", 3 * GIB, GIB), MACHINE),
    "unreadable": ("0::/a\n", {"a/memory.max": "what?", "a/memory.current": "5"}, MACHINE),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_control_groups_count_as_the_machines_memory(case, cgroups):
    own, files, free = CASES[case]
    assert cgroups(own, files) == free


def test_the_pool_gets_half_of_what_a_container_has_left(cgroups):
    cgroups("0::/a\n", v2("a/", 3 * GIB, GIB))
    assert blocks_that_fit(1 << 20, CPU, wanted=None, useful=10**6) == 1024
    with pytest.raises(InvalidConfig, match="2048 blocks at most"):
        blocks_that_fit(1 << 20, CPU, wanted=2049, useful=10**6)


def test_kv_memory_is_the_size_of_the_pool_in_bytes(cgroups):
    cgroups("", {})
    assert blocks_that_fit(1 << 20, CPU, wanted=None, useful=3, kv_memory=(5 << 20) + 7) == 5
    with pytest.raises(InvalidConfig, match="kv_memory = 1000 holds no KV block: one takes 1048576 bytes"):
        blocks_that_fit(1 << 20, CPU, wanted=None, useful=3, kv_memory=1000)
    with pytest.raises(InvalidConfig, match=r"kv_memory = 9663676416 .* has 8\.6 GB free: 8192 blocks at most"):
        blocks_that_fit(1 << 20, CPU, wanted=None, useful=3, kv_memory=9 * GIB)


def test_an_llm_takes_kv_memory():
    llm = LLM("tiny", kv_memory="3MiB", device="cpu")
    assert llm.engine.num_blocks == (3 << 20) // llm.engine.bytes_per_block == 48
    assert (llm.engine.config.num_blocks, llm.engine.config.kv_memory) == (48, None), "the engine's size has one name"
    assert llm.build_engine(EngineConfig(kv_memory=10**6)).num_blocks == 15


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (5, 5), ("5", 5), ("2GiB", 2 << 30), ("2 GiB", 2 << 30), ("2GB", 2 * 10**9), ("1.5MiB", 3 << 19),
        ("0.5MB", 500_000), (" 512MiB ", 512 << 20),
    ],
)  # fmt: skip
def test_sizes_of_memory(size, count):
    assert num_bytes(size, "kv_memory") == EngineConfig(kv_memory=size).kv_memory == count


@pytest.mark.parametrize(
    "size",
    [
        "", "GiB", "2G", "2gib", "2 Gi B", "-2GiB", "1.5", "1e9", "0", "0MiB", "2GiB3", "٣GiB", "½GiB", "0x10",
        "1,5GiB", "nan", "inf", "9" * 5000, 0, -1, 1.5, True, [1], b"2GiB", float("inf"),
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InvalidConfig, match="kv_memory must be a"):
        EngineConfig(kv_memory=size)


def test_the_pool_has_one_size():
    with pytest.raises(InvalidConfig, match="kv_memory and num_blocks exclude each other"):
        EngineConfig(kv_memory="1GiB", num_blocks=5)


def test_a_limit_of_addresses_counts(cgroups, monkeypatch):
    resource = pytest.importorskip("resource", reason="Windows has no limit of addresses")
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + GIB, resource.RLIM_INFINITY))
    assert GIB // 2 < cgroups("", {}) <= GIB + (64 << 20), "ulimit -v"
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert cgroups("", {}) == MACHINE
