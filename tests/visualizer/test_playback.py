"""The view's tools in a real browser: stepping through events, animated copies, sources, saving and replaying."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from minipaged import LLM
from minipaged.config import MANAGERS
from minipaged.errors import InvalidConfig
from minipaged.events import Recorder, State, event_from_dict, load_recording
from minipaged.events.types import EVENT_TYPES
from minipaged.tiny import WEIGHTS
from tests.aio import run
from tests.visualizer.test_page import as_json, caught_up, finish, steps, submit
from visualizer.app import Visualizer
from visualizer.classroom import Guard
from visualizer.export import export
from visualizer.log import RecordLog
from visualizer.recordings import FOLDER, Recordings
from visualizer.scenarios import Arrival
from visualizer.sources import FUNCTIONS, OF_MANAGER, ROOT, sources

TOWN = "In a small town by the sea, there lived a girl named Anna. She had a red boat and"
FORK = [Arrival(0, TOWN, n=4, max_tokens=24, seed=2), Arrival(0, "Once upon a time", max_tokens=30, seed=1)]
GOLDEN = sorted(FOLDER.glob("*.jsonl"))


def position(page: Any) -> list[int]:
    return page.evaluate("[minipaged.player.position, minipaged.player.sub]")


# --- playback ---------------------------------------------------------------------------------------------------


def test_fork_and_copy_are_seen_one_event_after_the_other(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer, FORK)
    finish(visualizer)
    caught_up(page, visualizer)
    page.evaluate("""() => { const { player } = minipaged;
        player.seek(player.records.findIndex((r) => r.events.some((e) => e.type === "copied"))); }""")
    page.wait_for_function("!minipaged.player.changed")
    copies = page.evaluate("""minipaged.player.records[minipaged.player.position].events
        .filter((e) => e.type === "copied")""")
    assert len(copies) == 3, "the last of four writers needs no copy"
    src = page.locator(f"[data-testid=block][data-block='{copies[0]['src']}']")
    assert src.get_attribute("data-refs") == "4", "the fork was in the step before"
    seen = []
    while len(seen) < 3:
        page.keyboard.press("Shift+ArrowRight")
        page.wait_for_function("!minipaged.player.changed")
        if page.evaluate("minipaged.player.latest[0].type") == "copied":
            seen.append(src.get_attribute("data-refs"))
            flight = page.locator("[data-testid=flight]")
            assert flight.count() == 1 and flight.get_attribute("data-kind") == "copy"
            assert "is copied to" in page.text_content("[data-testid=narration]")
            assert page.text_content("[data-testid=source]").startswith("BlockTables.reserve · block_table.py:")
    assert seen == ["3", "2", "1"]
    page.keyboard.press("Shift+ArrowLeft")
    page.wait_for_function("!minipaged.player.changed")
    assert src.get_attribute("data-refs") == "2"
    page.keyboard.press("ArrowLeft")
    assert position(page)[1] == 0, "back to the start of the step"


def test_a_moment_is_the_same_however_it_is_reached(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer, FORK)
    finish(visualizer)
    caught_up(page, visualizer)
    script = """() => {
        const { player } = minipaged, dump = () => JSON.stringify(minipaged.dump());
        const moments = [[0, 0], [7, 2], [3, 0], [player.end, 0], [22, 3], [21, 0], [22, 3]];
        for (const [number, sub] of moments) {
            player.seek(player.first);
            while (player.position < number) player.stepBy(1);
            for (let i = 0; i < sub; i += 1) player.stepEvent(1);
            const walked = dump(), where = [player.position, player.sub];
            player.seek(player.end);
            player.seek(number, sub);
            if (dump() !== walked || String(where) !== String([number, sub])) return `jump to ${number}, ${sub}`;
            player.stepEvent(1);
            player.stepEvent(-1);
            if (dump() !== walked) return `back to ${number}, ${sub}`;
        }
        player.seek(player.end);
        const steps = [];
        while (player.position > player.end - 3) { steps.push(dump()); player.stepEvent(-1); }
        while (steps.length) { player.stepEvent(1); if (dump() !== steps.pop()) return "event by event"; }
        return "same";
    }"""
    assert page.evaluate(script) == "same"
    page.select_option("[data-testid=speed]", "8")
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    page.wait_for_function("minipaged.player.mode === 'live' && minipaged.player.position === minipaged.player.end")


def test_the_list_of_events_leads_back_to_them(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer, FORK)
    finish(visualizer)
    caught_up(page, visualizer)
    page.click("[data-testid=events-toggle]")
    entry = page.locator("[data-testid=event]").filter(has=page.locator("[data-kind=copy-on-write]"))
    number = int(entry.get_attribute("data-number"))
    entry.click()
    assert position(page) == [number, 0] and page.evaluate("minipaged.player.current.mark") == "copied"
    assert 3 <= page.locator("[data-testid=event]").count() <= 30
    box = page.locator("[data-testid=scrub]").bounding_box()
    share = number / page.evaluate("minipaged.player.end")
    page.mouse.move(box["x"] + 7 + share * (box["width"] - 14), box["y"] + 3)
    page.locator("[data-testid=tip]").filter(has_text="copy-on-write").wait_for()


def test_swapping_flies_to_the_cpu_and_back(launching: Callable[..., Visualizer], pages: Any) -> None:
    llm = LLM("tiny", num_blocks=14, block_size=16, preemption="swap", swap_blocks=16)
    llm.engine.eos_token_ids = frozenset()
    visualizer = launching(llm, scenario=None, rate=None)
    page = pages.open(visualizer)
    submit(visualizer, [Arrival(0, f"One day, a fox met {n} owls.", max_tokens=90, seed=n) for n in range(4)])
    finish(visualizer)
    assert caught_up(page, visualizer) == as_json(visualizer.log.state)
    for mark, kind in (("swapped_out", "swap-out"), ("swapped_in", "swap-in")):
        events = page.evaluate(
            """(mark) => { const { player } = minipaged;
                player.seek(player.first + player.records.findIndex((r) => r.mark === mark) + 1);
                return player.latest.filter((e) => e.type === mark); }""",
            mark,
        )
        page.wait_for_function("!minipaged.player.changed")
        flights = page.eval_on_selector_all(
            f"[data-testid=flight][data-kind={kind}]", "lines => lines.map(l => [l.dataset.from, l.dataset.to])"
        )
        pool = [str(block) for event in events for block in event["blocks"]]
        cpu = [f"cpu-{block}" for event in events for block in event["swap_blocks"]]
        pairs = zip(pool, cpu, strict=True) if kind == "swap-out" else zip(cpu, pool, strict=True)
        assert flights == [list(pair) for pair in pairs]
        refs = page.eval_on_selector_all("[data-testid=swap-block]", "cells => cells.map(c => Number(c.dataset.refs))")
        assert refs == page.evaluate("minipaged.player.state.swap_ref_counts")
        told = page.get_attribute("[data-testid=narration]", "data-kind")
        assert told == kind.replace("-", " ")


# --- sources ----------------------------------------------------------------------------------------------------


def test_sources_name_the_line_that_defines_the_function() -> None:
    files = sources()["files"]
    managers = sources()["managers"]
    lists = [(sources()["functions"], FUNCTIONS), *((managers[name], own) for name, own in OF_MANAGER.items())]
    assert {"paged", *OF_MANAGER} == set(MANAGERS)
    for told, kind, function in ((told, *item) for told, functions in lists for item in functions.items()):
        assert files[told[kind]["file"]] == (ROOT / told[kind]["file"]).read_text(encoding="utf-8")
        lines = files[told[kind]["file"]].splitlines()[told[kind]["line"] - 1 : told[kind]["last"]]
        assert lines[0].strip().startswith(f"def {function.__name__}("), kind
        assert ast.parse(dedent("\n".join(lines))).body[0].name == function.__name__ and lines[-1].strip()
        assert told[kind]["url"] is None or told[kind]["url"].startswith("https://github.com/")
    assert len(json.dumps(files)) < 120_000, "every page includes the sources"


def test_every_event_type_leads_to_a_public_function() -> None:
    """A reader who clicks an event expects code that is part of the interface, whichever event it is."""
    assert set(FUNCTIONS) == set(EVENT_TYPES) | {"shared_prefix"}
    every = [*FUNCTIONS.values(), *(function for own in OF_MANAGER.values() for function in own.values())]
    assert [function.__qualname__ for function in every if function.__name__.startswith("_")] == []


@pytest.mark.parametrize("home", [None, "https://github.com/somebody/minipaged"])
def test_the_source_opens_in_a_panel(
    home: str | None, launching: Callable[..., Visualizer], pages: Any, monkeypatch: Any
) -> None:
    """The panel works with and without a project URL, because the page contains the code."""
    monkeypatch.setattr("visualizer.sources._project_url", lambda: home)
    sources.cache_clear()
    visualizer = launching()
    sources.cache_clear()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, FORK)
    steps(visualizer, 1)
    caught_up(page, visualizer)
    panel = page.locator("[data-testid=source-panel]")
    for key in ("Enter", "Space"):
        page.focus("[data-testid=source]")
        page.keyboard.press(key)
        panel.filter(has_text="def ").wait_for()
        kind = page.get_attribute("[data-testid=source]", "data-source")
        function = sources()["functions"][kind]
        marked = page.text_content("[data-testid=source-lines]").splitlines()
        assert len(marked) == function["last"] - function["line"] + 1
        assert marked[0].split(maxsplit=1)[0] == str(function["line"])
        assert f"def {FUNCTIONS[kind].__name__}(" in marked[0]
        top = page.evaluate("""() => { const pre = document.querySelector("[data-testid=source-panel] pre");
            return pre.querySelector("mark").getBoundingClientRect().top - pre.getBoundingClientRect().top; }""")
        assert 0 <= top < 200, "the line must be visible"
        assert page.locator("[data-testid=source-panel] a").is_visible() == bool(home)
        page.keyboard.press("Escape")
        panel.wait_for(state="hidden")
        assert page.evaluate("minipaged.player.mode") == "live", "the keys must not move the timeline"


# --- recordings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_the_reducers_agree_on_what_is_shipped(
    path: Path, launching: Callable[..., Visualizer], pages: Any, tmp_path: Path
) -> None:
    """Python's and JavaScript's reducers agree after every step, with ``--replay`` and in the exported page."""
    assert path.stat().st_size < 300_000
    expected, state = [], State()
    for event in load_recording(path):
        state.apply(event)
        if event.type == "step_finished":
            expected.append(as_json(state))
    visualizer = launching(replay=path)
    page = pages.open(visualizer)
    assert page.is_visible("[data-testid=notice]") and not page.is_visible("[data-testid=generate]")
    script = """(expected) => {
        const sorted = (x) => x === null || typeof x !== "object" ? x : Array.isArray(x) ? x.map(sorted)
            : Object.fromEntries(Object.keys(x).sort().map((key) => [key, sorted(x[key])]));
        const { player } = minipaged;
        let step = 0;
        for (let number = 1; number <= player.end; number += 1) {
            player.seek(number);
            minipaged.check();
            if (player.latest.at(-1).type !== "step_finished") continue;
            if (JSON.stringify(sorted(minipaged.dump())) !== JSON.stringify(sorted(expected[step++]))) return step;
        }
        return step === expected.length ? "agree" : "steps are missing";
    }"""
    assert page.evaluate(script, expected) == "agree"

    file = tmp_path / "replay.html"
    file.write_text(export(path.read_text(encoding="utf-8")), encoding="utf-8")
    exported = pages.file(file)
    assert exported.evaluate(script, expected) == "agree"
    exported.keyboard.press("Home")
    exported.keyboard.press("ArrowRight")
    assert position(exported) == [1, 0] and exported.is_visible("[data-testid=block]")


def test_a_run_is_saved_exported_and_loaded_again(serve: Callable[..., Visualizer], pages: Any, tmp_path: Path) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer, FORK)
    finish(visualizer)
    final = caught_up(page, visualizer)
    files = {}
    for button in ("save", "export"):
        page.click("[data-testid=recordings-toggle]")
        with page.expect_download() as download:
            page.click(f"[data-testid={button}]")
        files[button] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[button])
    state = State()
    for event in load_recording(files["save"]):
        state.apply(event)
    assert as_json(state) == final

    page.set_input_files("[data-testid=file]", files["save"])
    page.locator("[data-testid=notice]").filter(has_text="minipaged-run.jsonl").wait_for()
    page.evaluate("minipaged.player.seek(minipaged.player.end)")
    assert page.evaluate("minipaged.dump()") == final
    page.click("[data-testid=leave]")
    assert caught_up(page, visualizer) == final and page.is_visible("[data-testid=generate]")

    exported = pages.file(files["export"])
    exported.evaluate("minipaged.player.seek(minipaged.player.end)")
    assert exported.evaluate("minipaged.dump()") == final


def test_a_recording_does_not_control_the_engine_behind_it(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, FORK)
    steps(visualizer, 8)
    caught_up(page, visualizer)
    run, tables = visualizer.log.run, visualizer.thread.engine.block_tables()
    page.click("[data-testid=nav-chat]")
    page.set_input_files("[data-testid=file]", GOLDEN[0])
    page.wait_for_function("minipaged.player.recording")
    assert page.is_visible("[data-testid=rows]") and page.is_hidden("[data-testid=nav-chat]")
    page.evaluate("""() => { const { player } = minipaged;
        player.seek(player.records.findIndex((r) => r.mark === "forked")); }""")
    page.wait_for_function("!minipaged.player.changed")
    page.click("[data-testid=sequence][data-state=running] .mp-badge")
    page.wait_for_selector("[data-testid=sequence-kind]:text-is('running')")
    assert page.is_hidden("[data-testid=fork]") and page.is_hidden("[data-testid=abort]")
    shown = page.evaluate("minipaged.dump()")
    for button in ("abort", "fork", "reset"):  # the buttons are only hidden
        page.evaluate("button => document.querySelector(`[data-testid=${button}]`).click()", button)
    for alert in ("refusal", "message"):
        page.locator(f"[data-testid={alert}]").filter(has_text="This is a recording").wait_for(state="attached")
    assert page.evaluate("minipaged.dump()") == shown
    assert visualizer.log.run == run and visualizer.thread.engine.block_tables() == tables
    page.click("[data-testid=leave]")
    caught_up(page, visualizer)
    assert page.is_visible("[data-testid=nav-chat]")


def test_what_is_no_recording_is_told_in_one_message(
    serve: Callable[..., Visualizer], pages: Any, tmp_path: Path
) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    lines = GOLDEN[0].read_text(encoding="utf-8").splitlines()
    broken = {
        "line 1": "this is not JSON",
        "does not say": '{"format": "something else"}',
        "nothing in it": lines[0],
        "unknown event": "\n".join([*lines[:2], '{"type": "__proto__"}']),
        "line 9": "\n".join([*lines[:8], lines[8][:-5]]),
        "line 4": "\n".join([*lines[:3], '{"type":"copied","seq_id":99,"logical":0,"src":0,"dst":1}']),
    }
    file = tmp_path / "odd.jsonl"
    for words, text in broken.items():
        file.write_text(text, encoding="utf-8")
        page.set_input_files("[data-testid=file]", file)
        page.locator("[data-testid=trouble]").filter(has_text=words).wait_for()
        with pytest.raises(ValueError):
            Recordings(RecordLog()).add(file)
    assert page.evaluate("minipaged.player.recording") is False
    page.set_input_files("[data-testid=file]", GOLDEN[0])
    page.wait_for_function("minipaged.player.recording")


def test_replaying_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from visualizer.app import build_replay;"
        f"build_replay(Path({str(GOLDEN[0])!r})); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_a_wrong_setting_is_an_error_and_not_a_reason_to_show_recordings(launching: Callable[..., Visualizer]) -> None:
    with pytest.raises(InvalidConfig, match="kv_memory"):
        launching(lambda: LLM(str(WEIGHTS), kv_memory=1), recordings_will_do=True)


def test_without_a_model_the_recordings_are_shown(launching: Callable[..., Visualizer], pages: Any) -> None:
    def no_model() -> Any:
        raise FileNotFoundError("the weights are gone")

    page = pages.open(launching(no_model, recordings_will_do=True))
    page.locator("[data-testid=trouble]").filter(has_text="the weights are gone").wait_for()
    page.click("[data-testid=recordings-toggle]")
    page.locator("[data-testid=shipped]").nth(2).click()
    page.locator("[data-testid=notice]").filter(has_text=GOLDEN[2].stem).wait_for()


def test_a_run_too_long_to_save_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visualizer.log.MAX_SAVED", 1000)
    log, events = RecordLog(), load_recording(GOLDEN[0])
    log.started(events[0])  # type: ignore[arg-type]
    short = run(Recordings(log).recording({}))
    assert [event_from_dict(json.loads(line)) for line in short["text"].splitlines()[1:]] == events[:1]
    for event in events[1:40]:
        log.publish([event])
    answer = run(Recordings(log).recording({}))
    assert not answer["ok"] and "too long" in answer["message"]
    for name in ("../app.py", "/etc/passwd", 3, ["1-fork-and-preempt"]):
        assert not run(Recordings(log).recording({"name": name}))["ok"]


def test_the_recorder_and_the_page_write_the_same_lines(tmp_path: Path) -> None:
    events = load_recording(GOLDEN[0])[:60]
    recorder = Recorder(tmp_path / "by-recorder.jsonl")
    log = RecordLog()
    log.started(events[0])  # type: ignore[arg-type]
    for event in events:
        recorder(event)
    log.publish(events[1:])
    recorder.close()
    saved = run(Recordings(log).recording({}))["text"].splitlines()
    written = (tmp_path / "by-recorder.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in saved] == [json.loads(line) for line in written]


# --- permissions ------------------------------------------------------------------------------------------------


def test_the_guard_wants_the_token_with_every_command() -> None:
    async def obey(payload: Any) -> dict[str, Any]:
        return {"ok": True, "result": payload["do"]}

    def ask(guard: Guard, payload: Any) -> bool:
        return run(guard(payload))["ok"]

    guard = Guard(obey, classroom=True)
    for do in ("submit", "abort", "pause", "resume", "step", "rate", "reset", "play"):
        assert ask(guard, {"do": do, "token": guard.token})
        for wrong in (None, "", guard.token[:-1], guard.token + " ", [guard.token], 3, "é\ud800", "x" * 10**6):
            assert not ask(guard, {"do": do, "token": wrong})
        assert not ask(guard, {"do": do})
    for payload in (None, [], "reset", 3, {"do": ["attention"]}, {"do": {}}):
        assert not ask(guard, payload)
    assert ask(guard, {"do": "attention", "seq_id": 0, "position": 0}), "attention only reads"
    assert ask(Guard(obey, classroom=False), {"do": "pause"}), "without a classroom, no token is needed"


def test_in_a_classroom_viewers_watch_and_the_presenter_controls(
    launching: Callable[..., Visualizer], pages: Any
) -> None:
    visualizer = launching(classroom=True)
    viewer = pages.open(visualizer)
    viewer.locator("[data-testid=watching]").wait_for()
    for control in ("generate", "engine-pause", "nav-chat"):
        assert not viewer.is_visible(f"[data-testid={control}]")
    submit(visualizer, FORK)
    finish(visualizer)
    caught_up(viewer, visualizer)
    viewer.keyboard.press("Home")
    assert position(viewer) == [0, 0]
    # The buttons are only hidden; the server rejects the command.
    run = visualizer.log.run
    viewer.evaluate("document.querySelector('[data-testid=reset]').click()")
    refused = viewer.locator("[data-testid=message]").filter(has_text="Only the presenter")
    refused.wait_for(state="attached")
    assert visualizer.log.run == run

    presenter = pages.open(visualizer, f"/?presenter={visualizer.presenter}")
    presenter.wait_for_selector("[data-role=presenter]")
    assert visualizer.presenter not in presenter.url, "a projector must not show the token"
    presenter.click("[data-testid=reset]")
    presenter.wait_for_function("run => minipaged.player.run !== run", arg=run)


def test_a_crashed_engine_is_restarted_from_the_banner(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)

    def bug() -> None:
        raise KeyError("who knows")

    visualizer.thread.engine.step = bug
    submit(visualizer, FORK)
    visualizer.thread.resume().result(20)
    page.locator("[data-testid=banner]").filter(has_text="who knows").wait_for()
    page.click("[data-testid=restart]")
    page.locator("[data-testid=banner]").wait_for(state="hidden")
    submit(visualizer, FORK)
    finish(visualizer)
    assert caught_up(page, visualizer) == as_json(visualizer.log.state) and not visualizer.log.state.error


# --- accessibility ----------------------------------------------------------------------------------------------


def test_axe_finds_nothing_serious(serve: Callable[..., Visualizer], pages: Any) -> None:
    import axe_core_python.base as axe  # from the dev extra; without it, the test fails

    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, FORK)
    steps(visualizer, 20)
    caught_up(page, visualizer)
    page.evaluate(script)
    page.click("[data-testid=events-toggle]")
    page.click("[data-testid=recordings-toggle]")
    for dark in (False, True):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        found = page.evaluate("axe.run('.mp', { resultTypes: ['violations'] })")
        serious = [
            f"{rule['id']}: {node['html'][:150]}: {node['any'][0]['message'] if node['any'] else rule['help']}"
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
        assert not serious, f"{'dark' if dark else 'light'}:\n" + "\n".join(serious)


def test_without_motion_a_copy_is_a_line_alone(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.emulate_media(reduced_motion="reduce")
    submit(visualizer, FORK)
    finish(visualizer)
    caught_up(page, visualizer)
    page.evaluate("""() => { const { player } = minipaged;
        player.seek(player.records.findIndex((r) => r.mark === "copied") + 1); }""")
    page.wait_for_selector("[data-testid=flight]", state="attached")
    assert page.locator("[data-testid=flight]").count() == 3 and page.locator(".mp-flights rect").count() == 0
