"""The authors' gate, for every lab: starters fail, references and the engine pass, every bug is noticed."""

import pytest

from minipaged.labs import catalogue
from minipaged.labs.verify import verify


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.key)
def test_the_lab_is_fair_and_its_checks_notice_every_bug(lab):
    found = list(verify(lab))
    assert [(what, wrong) for what, wrong in found if wrong] == []
    skipped = [what for what, _ in found if what.startswith("skipped")]
    if skipped:
        pytest.skip(skipped[0])
    assert len(found) > 2 * len(lab.tasks) + len(lab.mutants)
