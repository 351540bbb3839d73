"""Runs the tests of the Triton kernels in Triton's interpreter: they need no GPU, but their own process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)  # half a minute on an idle machine, more on a busy one
@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists only for Linux")
def test_kernels_equal_their_oracles_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/interpreted"]  # prints its seed
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 50 and "skipped" not in done.stdout, done.stdout
