"""Configuration of all tests: one thread, random order, and random numbers that do not depend on the order."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests' models are faster on one thread

# `make test-fast` runs these folders and files of tests/: the heart and what most changes touch, without a browser,
# subprocesses or long random runs. A new file is fast only if it is named here.
FAST = {
    "core", "events", "execution", "text", "workloads", "features/test_batchllm.py", "features/test_buddy.py",
    "features/test_contiguous.py", "features/test_drafts.py", "features/test_eviction.py", "test_beams.py",
    "test_engine.py", "test_events.py", "test_examples.py", "test_golden.py", "test_house.py", "test_llm.py",
    "test_outputs.py", "test_pitfalls.py", "test_plug_ins.py", "models/test_parity.py", "visualizer/test_scripts.py",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks the tests of ``FAST``."""
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests)
        if {path.as_posix(), path.parts[0]} & FAST:
            item.add_marker("fast")


def pytest_configure(config):
    """pytest-randomly shuffles the tests. It must not seed Python's and numpy's generators: tests seed their own."""
    config.option.randomly_reset_seed = False
    # A shell starts background jobs with Ctrl-C ignored; the tests of Ctrl-C, and their processes, would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_for_every_test():
    """Seeds torch before each test, and then restores the exception hook, which typer and torch.distributed replace."""
    hook = sys.excepthook
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    sys.excepthook = hook
