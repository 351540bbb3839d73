"""What other managers would hold, as the server tells it: right at every record, and worked out once for everybody."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minipaged.events import Event, State, StepFinished, event_from_dict
from minipaged.memory import waste
from minipaged.memory.waste import Accounts
from tests.visualizer.test_log import record_run
from visualizer import log as log_module
from visualizer.log import RecordLog
from visualizer.waste_rows import PAGE_TOKENS, WasteRows, flat


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ask(rows: WasteRows, **request: Any) -> dict[str, Any]:
    return reply(rows, request)


def reply(rows: WasteRows, request: Any) -> dict[str, Any]:
    rows.catch_up()  # awaited in a thread when a page asks
    return json.loads(rows.answer(request))


def events_of(log: RecordLog) -> list[Event]:
    answer = json.loads(log.news(None, None, None) or "")
    state = State.from_dict(answer["keyframe"])
    assert answer["first"] == 0 and not state.seqs
    return [event_from_dict(event) for record in answer["records"] for event in record]


def test_the_rows_are_the_timelines() -> None:
    log = RecordLog()
    record_run(log)
    answer = ask(WasteRows(log))
    assert [row[0] for row in answer["rows"]] == list(range(log.end))
    accounts = Accounts(State.from_dict(json.loads(log._keyframes[0])), page_tokens=PAGE_TOKENS)
    for event in events_of(log):
        accounts.apply(event)
        if isinstance(event, StepFinished):
            accounts.close()
    accounts.update()
    by_step = {row[1]: row for row in answer["rows"]}
    for row in accounts.rows.values():
        assert by_step[row.step][1:] == flat(0, row)[1:]
        assert len(by_step[row.step]) == 3 + 5 * len(waste.MANAGERS)
    assert max(row.running for row in accounts.rows.values()) > 2


def test_eight_viewers_cost_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in rows and not in seconds: a row is computed once, and again when one of its texts ends early."""
    computed, encoded = [], []
    row, encode_answer = waste.Accounts._row, WasteRows._encode
    monkeypatch.setattr(waste.Accounts, "_row", lambda self, shot: computed.append(1) or row(self, shot))
    monkeypatch.setattr(WasteRows, "_encode", lambda *args: encoded.append(1) or encode_answer(*args))
    log, clock = RecordLog(), Clock()
    record_run(log)
    rows = WasteRows(log, clock)
    for _ in range(5):
        for _ in range(8):
            answer = ask(rows, run=log.run, revision=0, first=0)
        clock.now += 0.09
    assert len(computed) == log.end and len(encoded) == 1
    log.publish([])
    assert len(ask(rows, run=log.run, revision=answer["revision"])["rows"]) == 0, "not yet due"
    clock.now += 0.5
    assert len(ask(rows, run=log.run, revision=answer["revision"])["rows"]) == 1
    assert len(computed) == log.end


def test_a_viewer_who_has_rows_gets_only_what_changed_and_the_others_get_all() -> None:
    log, clock = RecordLog(), Clock()
    record_run(log, requests=3)
    rows = WasteRows(log, clock)
    newcomer = ask(rows, run="another", revision=77)
    assert len(newcomer["rows"]) == log.end
    assert ask(rows, run=log.run, revision=newcomer["revision"], first=0)["rows"] == []
    assert [row[0] for row in ask(rows, first=5)["rows"]] == list(range(5, log.end))
    for nonsense in ({"run": log.run, "revision": "x"}, {"first": None}, {"run": [], "revision": True}):
        assert len(ask(rows, **nonsense)["rows"]) == log.end
    assert len(reply(rows, ["no", "object"])["rows"]) == log.end


def test_a_new_run_and_forgotten_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_RECORDS", 2 * log_module.KEYFRAME_EVERY)
    monkeypatch.setattr(log_module, "MAX_FINISHED", 30)
    log, clock = RecordLog(), Clock()
    rows = WasteRows(log, clock)
    seen = ask(rows)
    record_run(log, requests=40)
    clock.now += 1
    answer = ask(rows, run=seen["run"], revision=seen["revision"])
    assert answer["run"] == log.run != seen["run"]
    assert [row[0] for row in answer["rows"]] == list(range(log.first, log.end))
