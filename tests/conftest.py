"""Configuration of all tests: one thread, random order, and random numbers that do not depend on the order."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests' models are faster on one thread


def pytest_configure(config):
    """pytest-randomly shuffles the tests. It must not seed Python's and numpy's generators: tests seed their own."""
    config.option.randomly_reset_seed = False


@pytest.fixture(autouse=True)
def same_for_every_test():
    """Seeds torch before each test, and then restores the exception hook, which typer and torch.distributed replace."""
    hook = sys.excepthook
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    sys.excepthook = hook
