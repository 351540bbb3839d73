"""The C++ kernels of native.cpp for CPUs, compiled at first use, as Triton compiles its kernels for a GPU.

``paged_decode`` is one of the functions that a model calls; ``forward`` computes a whole step
(`minipaged.features.cpu_step`). They need a C++ compiler (``c++``, or the one that ``CXX`` names), and support float32
and bfloat16 tensors on a CPU; other calls go to `reference`, which documents the functions. The library is cached
in ``~/.cache/minipaged`` (or ``XDG_CACHE_HOME``) under a name that depends on source, compiler, processor and content.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from minipaged.kernels import reference

SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
ARGUMENTS = {
    "paged_decode": (POINTER, NUMBER, *[POINTER] * 3, NUMBER, POINTER, POINTER, *[NUMBER] * 5, REAL, NUMBER),
    "forward": (POINTER, POINTER),
}


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the C++ kernels cannot be used on this machine; empty if they can. Compiles them if necessary."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"the C++ kernels are not built on {platform.system()}"
    try:
        _library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"the C++ kernels cannot be built: {error}"
    return ""


@lru_cache(maxsize=1)
def _library() -> dict[tuple[str, torch.dtype], ctypes._NamedFuncPointer]:
    """The compiled functions by name and dtype. Raises OSError if there is no compiler, or compilation fails."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise OSError("no C++ compiler was found (c++, or CXX)")
    openmp = _loaded_openmp()
    # Use torch's own thread pool: a second pool would compete with it for the cores.
    attempts: list[tuple[str, ...]] = [("-march=native", "-fopenmp", openmp)] if openmp else []
    attempts += [("-march=native", "-Wno-unknown-pragmas"), ("-Wno-unknown-pragmas",)]
    reason: Exception = OSError("no flags to try")
    for flags in attempts:
        try:
            return _built(compiler, flags)
        except (OSError, subprocess.SubprocessError) as error:
            reason = error
    raise reason


def _built(compiler: str, flags: tuple[str, ...]) -> dict[tuple[str, torch.dtype], ctypes._NamedFuncPointer]:
    """The functions, compiled with these flags. Raises OSError or SubprocessError if compilation fails."""
    library = ctypes.CDLL(str(_compiled(compiler, flags)))
    functions = {}
    for name, arguments in ARGUMENTS.items():
        for dtype, suffix in TYPES.items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            functions[name, dtype] = function
    return functions


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """The path of the library built with these flags, from the cache or newly compiled.

    The name ends with a hash of the content: to load a truncated file would kill the process, so it is compiled again.
    """
    about = (*(path.read_text() for path in [SOURCE, *HEADERS]), compiler, *flags, platform.machine(), _processor())
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minipaged"
    for cached in folder.glob(f"native-{name}-*.so"):
        if cached.stem.endswith(_digest(cached)):
            return cached
        cached.unlink(missing_ok=True)  # another process may have found it, too
    print("minipaged: compiling the C++ kernels, once for this machine and version", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        options = [flag for flag in flags if flag.startswith("-")]
        libraries = [flag for flag in flags if not flag.startswith("-")]
        # In two steps: given -fopenmp, the linker would add its own OpenMP library.
        steps = [
            [compiler, "-c", *FLAGS, *options, str(SOURCE), "-o", f"{scratch}/native.o"],
            [compiler, "-shared", f"{scratch}/native.o", *libraries, "-o", f"{scratch}/native.so"],
        ]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise OSError(f"{compiler} fails: {(done.stderr.strip() or 'no reason given').splitlines()[0]}")
        built = Path(scratch, "native.so")
        # Atomic: another process may build it at the same time.
        return built.replace(folder / f"native-{name}-{_digest(built)}.so")


def _digest(library: Path) -> str:
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    except OSError as error:  # another process has removed it since, or it cannot be read
        return f"unreadable: {error}"


def _processor() -> str:
    """Identifies the processor, since machines may share a home directory; precise only on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _loaded_openmp() -> str:
    """The path of the GNU OpenMP library that torch uses; empty if torch uses another one, or if it is unknown."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[-1] for line in maps if "/libgomp" in line), "")


def function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    """A kernel for this dtype. Call it only if `missing` returns an empty string."""
    return _library()[name, dtype]


# --- the kernels --------------------------------------------------------------------------------------------


def _serves(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    return dtype in TYPES and all(t.dtype is dtype and t.device.type == "cpu" for t in tensors)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As `reference.paged_decode`."""
    if k_scale is not None or not _serves(q, k_cache, v_cache):
        return reference.paged_decode(
            q, k_cache, v_cache, block_tables, context_lens, scale, sliding_window, k_scale, v_scale
        )
    q = _rows(q)
    out = q.new_empty(q.shape)
    _library()["paged_decode", q.dtype](
        q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), block_tables.data_ptr(),
        block_tables.stride(0), context_lens.data_ptr(), out.data_ptr(), *q.shape[:2], k_cache.shape[2], q.shape[2],
        k_cache.shape[1], scale, sliding_window or 0,
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """``x`` [T, H, D] itself, if each row of H · D numbers is contiguous; otherwise a contiguous copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
