"""What the engine does stays what it was, event by event."""

import json

from tests.golden import CONFIGURATIONS, FILE, digests


def test_every_event_of_every_configuration_is_as_it_was():
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert golden.keys() == CONFIGURATIONS.keys()
    assert digests() == golden, "behaviour changed: if it was meant to, see tests/golden.py"
