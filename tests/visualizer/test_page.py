"""The page in a real browser, compared with the engine behind it."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from gradio.context import Context

from minipaged.events import State, event_from_dict
from tests.fake import running_groups
from visualizer import log as log_module
from visualizer.app import STATIC, PortInUse, Visualizer, launch
from visualizer.scenarios import DEMO_SETTINGS, OPENING, SCENARIOS, Arrival

STORIES = [
    Arrival(0, "Once upon a time", max_tokens=90, seed=1),
    Arrival(0, "In a small town by the sea, there lived a girl named Anna. She had a red boat and a dog. So",
            n=4, max_tokens=70, temperature=1.0, seed=2),
    Arrival(0, "The robot opened the door and", n=2, max_tokens=80, seed=3),
]  # fmt: skip


def submit(visualizer: Visualizer, arrivals: list[Arrival] = STORIES) -> list[str]:
    return [visualizer.thread.submit(arrival).result(20) for arrival in arrivals]


def steps(visualizer: Visualizer, count: int) -> None:
    for _ in range(count):
        visualizer.thread.step().result(20)


def finish(visualizer: Visualizer) -> None:
    deadline = time.monotonic() + 60
    while visualizer.thread.call(visualizer.thread._has_work).result(20):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def caught_up(page: Any, visualizer: Visualizer) -> dict[str, Any]:
    """The page's state once it shows the log's last record. The engine must be paused or idle."""
    page.bring_to_front()  # a hidden tab does not draw
    page.evaluate("minipaged.player.live()")
    page.wait_for_function(
        "([run, end]) => minipaged.player.run === run && minipaged.player.position === end "
        "&& minipaged.player.end === end && !minipaged.player.changed",
        arg=[visualizer.log.run, visualizer.log.end],
    )
    return page.evaluate("minipaged.dump()")


def as_json(state: State) -> dict[str, Any]:
    return json.loads(json.dumps(state.to_dict()))


def recorded(visualizer: Visualizer) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """The first keyframe and all records of the run, as a viewer gets them."""
    answer = json.loads(visualizer.log.news(None, None, None) or "")
    assert answer["first"] == 0
    return answer["keyframe"], answer["records"]


def replayed(visualizer: Visualizer, position: int) -> State:
    keyframe, records = recorded(visualizer)
    state = State.from_dict(keyframe)
    for record in records[:position]:
        for event in record:
            state.apply(event_from_dict(event))
    return state


def test_blocks_on_the_page_are_the_engines(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    for _ in range(4):
        steps(visualizer, 9)
        dump = caught_up(page, visualizer)
        tables = visualizer.thread.call(visualizer.thread.engine.block_tables).result(20)
        visualizer.thread.call(visualizer.thread.engine.check).result(20)
        page.evaluate("minipaged.check()")
        shown = {int(seq): value["table"] for seq, value in dump["seqs"].items() if value["table"]}
        assert shown == tables and len(tables) >= 7
        assert dump["step"] == visualizer.thread.engine.scheduler.step - 1
        refs = visualizer.thread.engine.memory.pool.ref_counts
        assert dump["ref_counts"] == refs

        cells = page.eval_on_selector_all(
            "[data-testid=block]",
            "cells => cells.map(c => [Number(c.dataset.block), Number(c.dataset.refs)])",
        )
        assert cells == [[block, count] for block, count in enumerate(refs)]
        rows = page.eval_on_selector_all(
            "[data-testid=sequence]",
            "rows => rows.map(r => [Number(r.dataset.seq), "
            "[...r.querySelectorAll('[data-chip]')].map(c => Number(c.dataset.chip))])",
        )
        assert {seq: table for seq, table in rows if table} == tables
        assert page.get_attribute("[data-testid=minipaged]", "data-step") == str(dump["step"])
    assert max(refs) == 4, "the four samples share their prompt"
    assert page.get_by_text("×4", exact=False).first.is_visible()


def test_text_arrives_and_is_the_engines(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    engine, outputs = visualizer.thread.engine, {}
    real = engine.step

    def step() -> Any:
        result = real()
        outputs.update({output.request_id: output for output in result})
        return result

    engine.step = step
    page = pages.open(visualizer)
    page.fill("[data-testid=prompt]", "Once upon a time")
    page.select_option("[data-testid=n]", "2")
    page.fill("[data-testid=max-tokens]", "40")
    page.press("[data-testid=prompt]", "Enter")
    page.wait_for_selector("[data-testid=sequence][data-state=finished] >> nth=1")
    finish(visualizer)
    caught_up(page, visualizer)
    for seq, output in enumerate(outputs["request-0"].outputs):
        shown = page.text_content(f"[data-testid=sequence][data-seq='{seq}'] .mp-output")
        assert shown == output.text and output.text
        prompt = page.text_content(f"[data-testid=sequence][data-seq='{seq}'] .mp-prompt")
        assert prompt == "Once upon a time"
    assert page.input_value("[data-testid=prompt]") == ""


def test_a_sample_prompt_is_one_click(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.click("text=What is a block table?")
    page.wait_for_selector("[data-testid=sequence]")
    finish(visualizer)
    caught_up(page, visualizer)
    assert "What is a block table?" in page.text_content("[data-testid=sequence] .mp-prompt")
    assert "<|" not in page.text_content("[data-testid=sequence]")


def test_a_double_click_asks_once(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.dblclick("text=What is a block table?")
    page.wait_for_selector("[data-testid=sequence]")
    page.fill("[data-testid=prompt]", "Once")
    page.wait_for_timeout(450)
    page.dblclick("[data-testid=generate]")
    page.wait_for_selector("[data-testid=sequence] >> nth=1")
    assert page.is_hidden("[data-testid=message]")
    finish(visualizer)
    caught_up(page, visualizer)
    assert len(visualizer.log.state.finished) == 2


def test_every_menu_looks_like_one(serve: Callable[..., Visualizer], pages: Any) -> None:
    page = pages.open(serve())
    menus = page.evaluate("""() => [...document.querySelectorAll(".mp select")].map((menu) => {
        const style = getComputedStyle(menu);
        return [menu.name || menu.dataset.part, style.backgroundImage.includes("svg"), parseFloat(style.paddingRight)];
    })""")
    assert len(menus) > 5
    for name, arrow, room in menus:
        assert arrow and room >= 20, name


def test_the_reducers_agree(serve: Callable[..., Visualizer], pages: Any) -> None:
    """The JavaScript and Python reducers agree on a run with forks, copies, preemptions and an abort."""
    visualizer = serve()
    page = pages.open(visualizer)
    crowd = STORIES + [Arrival(0, f"One day, a fox met {n} owls.", max_tokens=150, seed=n) for n in range(8)]
    ids = submit(visualizer, crowd)
    visualizer.thread.abort(ids[-1]).result(20)
    finish(visualizer)
    dump = caught_up(page, visualizer)
    keyframe, records = recorded(visualizer)
    types = {event["type"] for record in records for event in record}
    assert {"forked", "copied", "preempted", "freed", "cached", "finished"} <= types

    begin = json.loads(json.dumps(keyframe))  # a copy, because `from_dict` keeps the lists and events change them
    state, expected = State.from_dict(keyframe), {}
    for number, record in enumerate(records):
        for event in record:
            state.apply(event_from_dict(event))
        if number % 10 == 0 or any(event["type"] in ("forked", "copied", "preempted") for event in record):
            expected[number] = as_json(state)
    script = """async ([source, keyframe, records, expected]) => {
        const { State, check } = await import("data:text/javascript," + encodeURIComponent(source));
        const sorted = (x) => x === null || typeof x !== "object" ? x : Array.isArray(x) ? x.map(sorted)
            : Object.fromEntries(Object.keys(x).sort().map((key) => [key, sorted(x[key])]));
        const state = State.from(keyframe);
        for (const [i, record] of records.entries()) {
            for (const event of record) state.apply(event);
            check(state);
            const differs = () => JSON.stringify(sorted(state)) !== JSON.stringify(sorted(expected[i]));
            if (i in expected && differs()) return i;
        }
        return "agree";
    }"""
    reducer = (STATIC / "reducer.js").read_text(encoding="utf-8")
    assert page.evaluate(script, [reducer, begin, records, expected]) == "agree"
    assert dump == as_json(state)


def test_the_tree_of_a_batch_has_the_engines_groups(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.set_rate(0.01).result(20)  # slow enough that only requested steps run after the first
    visualizer.thread.reset(replace(SCENARIOS["batchllm"], asks=False)).result(20)
    visualizer.thread.pause().result(20)
    seen = set()
    for _ in range(4):
        dump = caught_up(page, visualizer)
        engine = visualizer.thread.engine
        kept = visualizer.thread.call(lambda e=engine: dict(running_groups(e).kept)).result(20)
        blocks = {number: [hit.block for hit in hits] for number, hits in kept.items()}
        assert {int(number): group["kept"] for number, group in dump["groups"].items() if group["kept"]} == blocks
        page.evaluate("minipaged.check()")
        assert dump == as_json(replayed(visualizer, visualizer.log.end))
        branches = page.eval_on_selector_all(
            "[data-testid=group]", "all => all.map(g => [g.dataset.group, g.querySelectorAll('.mp-leaf').length])"
        )
        assert branches == [[number, len(group["request_ids"])] for number, group in dump["groups"].items()]
        marked = page.eval_on_selector_all(".mp-cell[data-kept]", "cells => cells.map(c => Number(c.dataset.block))")
        assert marked == sorted(block for table in blocks.values() for block in table)
        seen.add(len(blocks))
        steps(visualizer, 20)
    assert len(seen) > 1
    visualizer.thread.reset().result(20)


def test_two_tabs_and_a_late_joiner_agree(
    serve: Callable[..., Visualizer], pages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "HISTORY", 10)
    visualizer = serve()
    first, second = pages.open(visualizer), pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    steps(visualizer, 65)
    late = pages.open(visualizer)
    dumps = [caught_up(page, visualizer) for page in (first, second, late)]
    assert dumps[0] == dumps[1] == dumps[2] == as_json(visualizer.log.state)
    assert late.evaluate("minipaged.player.first") >= log_module.KEYFRAME_EVERY
    first.bring_to_front()
    before = visualizer.log.end
    first.click("[data-testid=engine-step]")
    second.bring_to_front()
    second.wait_for_function("end => minipaged.player.position > end", arg=before)
    assert caught_up(first, visualizer) == caught_up(late, visualizer)


def test_engine_buttons_do_what_they_say(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve(rate=20)
    page = pages.open(visualizer)
    submit(visualizer)
    page.click("[data-testid=engine-pause]")
    page.wait_for_selector("[data-engine=paused]")
    assert page.text_content("[data-testid=engine-state]") == "paused"
    before = caught_up(page, visualizer)["step"]
    time.sleep(0.3)
    assert caught_up(page, visualizer)["step"] == before == visualizer.log.state.step
    page.click("[data-testid=engine-step]")
    page.wait_for_function("step => minipaged.dump().step === step + 1", arg=before)
    assert visualizer.log.state.step == before + 1
    page.click("[data-testid=engine-pause]")  # the button says "Resume"
    # Not [data-engine=running]: on a busy machine, the page may refresh only after the last step.
    page.wait_for_selector("[data-engine]:not([data-engine=paused])")
    page.wait_for_function("step => minipaged.dump().step > step + 4", arg=before)
    page.evaluate("""() => { const rate = document.querySelector("[data-testid=rate]");
        rate.value = rate.max; rate.dispatchEvent(new Event("input")); }""")
    finish(visualizer)
    page.wait_for_selector("[data-engine=idle]")
    page.click("[data-testid=reset]")
    page.wait_for_function("minipaged.player.end === 0 && Object.keys(minipaged.dump().seqs).length === 0")
    page.wait_for_function(
        "count => document.querySelectorAll('[data-testid=block][data-kind=free]').length === count",
        arg=DEMO_SETTINGS["num_blocks"],
    )


def test_freezing_and_rewinding_the_view_leaves_the_engine_alone(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve(rate=20)
    page = pages.open(visualizer)
    submit(visualizer)
    page.wait_for_function("minipaged.dump().step > 3")
    page.click("[data-testid=view-freeze]")
    frozen = page.evaluate("minipaged.dump()")
    page.wait_for_function("minipaged.player.end > minipaged.player.position + 9")  # the engine continues
    assert page.evaluate("minipaged.dump()") == frozen
    visualizer.thread.set_rate(None).result(20)
    finish(visualizer)
    page.wait_for_function("end => minipaged.player.end === end", arg=visualizer.log.end)

    for target in (45, 44, 46, 3, 0, visualizer.log.end, 81, 40):
        page.evaluate("n => minipaged.player.seek(n)", target)
        assert page.evaluate("minipaged.dump()") == as_json(replayed(visualizer, target))
        page.evaluate("minipaged.check()")
    at = page.evaluate("minipaged.player.position")
    page.click("[data-testid=view-back]")
    assert page.evaluate("minipaged.player.position") == at - 1
    page.click("[data-testid=view-forward]")
    page.click("[data-testid=view-forward]")
    assert page.evaluate("minipaged.player.position") == at + 1
    page.click("[data-testid=view-live]")
    assert page.evaluate("minipaged.player.position") == visualizer.log.end
    assert page.evaluate("minipaged.dump()") == as_json(visualizer.log.state)


def test_the_keyboard_moves_the_view(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer)
    finish(visualizer)
    caught_up(page, visualizer)
    position = "minipaged.player.position"
    page.keyboard.press("Space")
    assert page.evaluate("minipaged.player.mode") == "frozen"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(position) == visualizer.log.end - 2
    page.keyboard.press("ArrowRight")
    assert page.evaluate(position) == visualizer.log.end - 1
    page.keyboard.press("Home")
    assert page.evaluate(position) == 0
    page.keyboard.press("End")
    assert page.evaluate(position) == visualizer.log.end
    page.keyboard.press("Home")
    page.keyboard.press("l")
    assert page.evaluate(position) == visualizer.log.end
    assert page.evaluate("minipaged.player.mode") == "live"
    page.click("[data-testid=prompt]")
    page.keyboard.type("a l b")
    assert page.input_value("[data-testid=prompt]") == "a l b", "keys in a text field must not navigate"
    assert page.evaluate("minipaged.player.mode") == "live"


def test_bad_input_gets_words_and_others_are_served(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve(rate=20)
    page = pages.open(visualizer)
    ids = submit(visualizer)
    message = page.locator("[data-testid=message]")
    for prompt, max_tokens, words in [
        ("", "20", "empty"),
        ("   ", "20", "empty"),
        ("word " * 3900, "20", "tokens"),
        ("x" * 21_000, "20", "characters"),
        ("fine", "", "Max tokens"),
        ("fine", "99999", "Max tokens"),
    ]:
        page.fill("[data-testid=prompt]", prompt)
        page.fill("[data-testid=max-tokens]", max_tokens)
        page.click("[data-testid=generate]")
        message.filter(has_text=words).wait_for()
    page.fill("[data-testid=max-tokens]", "5")
    page.click("[data-testid=generate]")
    page.wait_for_function("document.querySelector('[data-testid=message]').hidden")
    visualizer.thread.set_rate(None).result(20)
    finish(visualizer)
    assert set(ids) < set(visualizer.log.state.finished)


def test_pointing_and_clicking_trace_a_sequence(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    steps(visualizer, 30)
    dump = caught_up(page, visualizer)
    page.click("[data-testid=sequence][data-seq='1']")
    page.wait_for_selector(".mp-arrows path")
    table = dump["seqs"]["1"]["table"]
    assert page.locator(".mp-arrows path").count() == len(table)
    bright = page.eval_on_selector_all(
        "[data-testid=block]:not(.mp-dim)", "cells => cells.map(c => Number(c.dataset.block))"
    )
    assert sorted(bright) == sorted(table)
    page.hover(f"[data-testid=block][data-block='{table[0]}']")
    inspect = page.locator("[data-testid=inspect]")
    inspect.filter(has_text="shared by B, C, D and E").wait_for()
    page.mouse.move(2, 2)
    page.keyboard.press("Escape")


def test_an_engine_error_is_told(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    runner = visualizer.thread.engine.runner
    real = runner.execute

    def fail(plan: Any) -> Any:
        runner.execute = real
        raise RuntimeError("out of luck")

    runner.execute = fail
    steps(visualizer, 1)
    page.locator("[data-testid=banner]").filter(has_text="out of luck").wait_for()
    assert caught_up(page, visualizer) == as_json(visualizer.log.state)
    page.click("[data-testid=banner] button")
    page.locator("[data-testid=banner]").wait_for(state="hidden")


@pytest.mark.parametrize("same_page", [True, False], ids=["restarted", "another version"])
def test_a_lost_server_is_told_and_found_again(
    launching: Callable[..., Visualizer], pages: Any, same_page: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    component_id = Context.id  # Gradio numbers components, and a restarted server starts at the same number
    visualizer = launching()
    page = pages.open(visualizer)
    page.evaluate("window.before = true")
    visualizer.close()
    banner = page.locator("[data-testid=banner]")
    banner.filter(has_text="does not answer").wait_for()
    if same_page:
        monkeypatch.setattr(Context, "id", component_id)
    again = launching()
    page.wait_for_function("run => window.minipaged?.player.run === run", arg=again.log.run)
    assert page.evaluate("window.before === true") == same_page, "the page should reload only for another version"
    submit(again)
    finish(again)
    assert caught_up(page, again) == as_json(again.log.state)
    assert banner.is_hidden()
    pages.complaints.clear()  # the browser itself logs refused connections


def test_the_opening_scenario_begins_by_itself_and_shows_everything(
    launching: Callable[..., Visualizer], pages: Any
) -> None:
    visualizer = launching(scenario=OPENING, rate=12, stories_end=True)
    time.sleep(0.3)
    assert visualizer.log.end == 0, "without viewers, no scenario starts"
    page = pages.open(visualizer)
    page.wait_for_selector("[data-testid=sequence] [data-chip]")  # benchmarks/first_paint.py measures the time
    visualizer.thread.set_rate(None).result(20)
    finish(visualizer)
    _, records = recorded(visualizer)
    step, first = 0, {}
    for event in (event for record in records for event in record):
        step = event.get("step", step)
        first.setdefault(event["type"], step)
    within = 20 * 12  # number of steps in the first 20 seconds
    assert all(first[kind] < within for kind in ("forked", "copied", "preempted", "finished"))
    admitted = [e["request_id"] for record in records for e in record if e["type"] == "admitted"]
    assert len(set(admitted)) == 8 < len(admitted), "eight requests, one of them readmitted"
    caught_up(page, visualizer)
    told = set(page.evaluate("minipaged.player.records.map((record) => record.told?.kind)"))
    assert {"arrival", "admit", "fork", "copy-on-write", "allocate", "preemption", "resume", "finish"} <= told
    run = visualizer.log.run
    page.click("[data-testid=play-again]")
    page.wait_for_function("run => minipaged.player.run !== run && minipaged.player.end > 3", arg=run)


def test_the_scene_fits_without_scrolling(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    for width, height in ((1280, 720), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert size == [width, height]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_chart_is_fed(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer)
    finish(visualizer)
    caught_up(page, visualizer)
    page.wait_for_function("document.querySelector('[data-testid=chart]').data?.[0].x.length === minipaged.player.end")
    traces = page.evaluate("document.querySelector('[data-testid=chart]').data.map(t => [...t.y])")
    reserved, used, logical, memory = (max(line) for line in traces)
    assert 0 < used <= reserved <= DEMO_SETTINGS["num_blocks"] * DEMO_SETTINGS["block_size"] and logical > used
    assert memory > 50, "MiB of this process"


def test_a_port_in_use_is_one_clear_error(launching: Callable[..., Visualizer], free_port: int) -> None:
    launching()
    with pytest.raises(PortInUse, match=f"port {free_port} is in use.*--port"):
        launch(lambda: pytest.fail("the model is loaded although the port is in use"), port=free_port)
