"""What all tests share: one thread, a random order, and random numbers that do not depend on it."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests' models are faster on one thread


def pytest_configure(config):
    """pytest-randomly shuffles the tests. It must not seed Python's and numpy's generators: tests seed their own."""
    config.option.randomly_reset_seed = False


@pytest.fixture(autouse=True)
def seeded():
    """torch's own random numbers are the same for a test, whichever tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
