"""Chooses an engine's attention backend: which implementation of the kernels its KV cache uses, and why."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from minipaged.errors import InvalidConfig
from minipaged.kernels import reference


class Kernels:
    """The functions that read or write KV. These are plain torch's; a backend's subclass replaces some of them.

    mypy compares each replacement with the function here: signature and meaning are those of `reference`.
    """

    name = "torch"
    store_kv = staticmethod(reference.store_kv)
    rope_store = staticmethod(reference.rope_store)
    add_norm = staticmethod(reference.add_norm)
    paged_decode = staticmethod(reference.paged_decode)
    paged_prefill = staticmethod(reference.paged_prefill)
    copy_blocks = staticmethod(reference.copy_blocks)
    swap_blocks = staticmethod(reference.swap_blocks)


TORCH = Kernels()


def choose(attention: str, device: torch.device) -> tuple[str, str]:
    """Resolves ``EngineConfig.attention`` for a device: the name of a backend, and the reason in words.

    Raises `InvalidConfig`, which says what to do, for a backend that cannot run on the device.
    """
    if attention == "auto":
        if device.type == "cpu":
            lacking = _no_native()
            return ("torch", lacking) if lacking else ("native", "the C++ kernels were compiled for this CPU")
        if device.type != "cuda":
            return "torch", f"Triton's kernels need CUDA, and this is {device.type}"
        missing = _no_triton()
        return ("torch", missing) if missing else ("triton", "CUDA is available, and Triton is installed")
    if attention == "triton":
        if missing := _no_triton():
            raise InvalidConfig(f'attention="triton": {missing}; choose "torch" or "auto"')
        if device.type != "cuda" and not _interpreted():
            raise InvalidConfig(
                f'attention="triton" needs CUDA, and this is {device.type}; choose "torch" or "auto" '
                "(TRITON_INTERPRET=1 runs the kernels on a CPU, very slowly: for tests)"
            )
    if attention == "flex" and device.type != "cuda":
        raise InvalidConfig(
            f'attention="flex" needs CUDA, and this is {device.type}, where torch takes minutes to compile it; '
            'choose "torch" or "auto"'
        )
    if attention == "native":
        lacking = _no_native() if device.type == "cpu" else f"it is for a CPU, and this is {device.type}"
        if lacking:
            raise InvalidConfig(f'attention="native": {lacking}; choose "torch" or "auto"')
    return attention, "chosen"


def kernels_for(attention: str, device: torch.device) -> Kernels:
    """The backend for ``EngineConfig.attention``. Raises `InvalidConfig` where it cannot run."""
    name, _ = choose(attention, device)
    return {"torch": lambda: TORCH, "triton": _triton, "flex": _flex, "native": _native}[name]()


def require_compiler() -> None:
    """Raises `InvalidConfig` where kernels cannot be compiled ahead of time."""
    if missing := _no_triton():
        raise InvalidConfig(missing)
    if _interpreted():
        raise InvalidConfig("TRITON_INTERPRET=1 interprets the kernels instead of compiling them; unset it")


def _triton() -> Kernels:
    # Imported here, so that the other backends need neither Triton nor the time to import it.
    # Under names that the class below does not have: its body cannot see this function's variables of the same name.
    from minipaged.kernels import copy_blocks as copy
    from minipaged.kernels import fused, swap
    from minipaged.kernels import paged_decode as decode
    from minipaged.kernels import paged_prefill as prefill
    from minipaged.kernels import store_kv as store

    class TritonKernels(Kernels):
        name = "triton"
        store_kv = staticmethod(store.store_kv)
        rope_store = staticmethod(fused.rope_store)
        add_norm = staticmethod(fused.add_norm)
        paged_decode = staticmethod(decode.paged_decode)
        paged_prefill = staticmethod(prefill.paged_prefill)
        copy_blocks = staticmethod(copy.copy_blocks)
        swap_blocks = staticmethod(swap.swap_blocks)

    return TritonKernels()


def _flex() -> Kernels:
    from minipaged.kernels import flex

    class FlexKernels(Kernels):
        name = "flex"
        paged_decode = staticmethod(flex.paged_decode)
        paged_prefill = staticmethod(flex.paged_prefill)

    return FlexKernels()


def _native() -> Kernels:
    from minipaged.kernels import native

    class NativeKernels(Kernels):
        name = "native"
        paged_decode = staticmethod(native.paged_decode)

    return NativeKernels()


def _no_native() -> str:
    """Why the C++ kernels cannot be used; empty if they can. Compiles them if necessary."""
    from minipaged.kernels import native

    return native.missing()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton() -> str:
    """Why Triton cannot be used; empty if it can."""
    return "" if find_spec("triton") else "Triton is not installed (pip install triton; it exists only for Linux)"
