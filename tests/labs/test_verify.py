"""The authors' verification of every lab: starters fail, references and the engine pass, every bug is detected."""

import os
import subprocess
import sys

import pytest

from minipaged.labs import catalogue
from minipaged.labs.verify import verify


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.key)
def test_the_lab_is_fair_and_its_checks_notice_every_bug(lab):
    if lab.environment and not lab.needs():  # variables must be set before torch or Triton is imported: a new process
        command = [sys.executable, "-m", "minipaged", "lab", "verify", lab.key]
        done = subprocess.run(command, env=os.environ | lab.environment, capture_output=True, text=True)
        assert done.returncode == 0 and "✗" not in done.stdout, done.stdout + done.stderr
        assert done.stdout.count("✓") > 2 * len(lab.tasks) + len(lab.mutants)
        return
    found = list(verify(lab))
    assert [(what, wrong) for what, wrong in found if wrong] == []
    skipped = [what for what, _ in found if what.startswith("skipped")]
    if skipped:
        pytest.skip(skipped[0])
    assert len(found) > 2 * len(lab.tasks) + len(lab.mutants)
