"""Scenarios, predictions, settings and the chat in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fake import swap_of
from tests.visualizer.test_page import caught_up, steps, submit
from visualizer.app import Visualizer
from visualizer.scenarios import SCENARIOS, Arrival


def test_choosing_a_scenario_plays_it_and_asks(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    for key, right in (("samples", True), ("prefix", False), ("swap", False)):
        page.select_option("[data-testid=scenario]", key)
        page.locator("[data-testid=lede]").filter(has_text=SCENARIOS[key].watch[:60]).wait_for()
        page.locator("[data-testid=choice]:enabled").first.wait_for()
        held = page.evaluate("minipaged.player.end")
        question = visualizer.thread._question
        assert page.text_content("[data-testid=quiz-text]") == question.text and page.is_checked("[data-testid=asks]")
        assert page.locator("[data-testid=block]").count() == SCENARIOS[key].settings["num_blocks"]
        assert page.is_hidden("[data-testid=narration]")
        assert page.get_attribute(f"[data-testid=tab-{SCENARIOS[key].tab}]", "aria-selected") == "true"
        chosen = question.answer if right else (question.answer + 1) % len(question.choices)
        page.keyboard.press(str(chosen + 1))
        page.wait_for_selector(f"[data-testid=quiz][data-verdict={'right' if right else 'wrong'}]")
        assert page.text_content("[data-testid=quiz-text]") == question.why
        assert page.text_content(".mp-right") == question.choices[question.answer]
        page.wait_for_function("held => minipaged.player.end > held", arg=held)
        page.click("[data-testid=quiz-skip]")
        page.wait_for_selector("[data-testid=narration]")
        page.evaluate("minipaged.check()")


def test_settings_are_the_engines(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.click("[data-testid=settings]")
    assert page.input_value("[data-testid=set-num_blocks]") == str(visualizer.thread.engine.num_blocks)
    message = page.locator("[data-testid=engine-message]")
    page.fill("[data-testid=set-num_blocks]", "-3")
    page.click("[data-testid=apply]")
    message.filter(has_text="Num blocks must be").wait_for()
    page.fill("[data-testid=set-num_blocks]", "24")
    page.fill("[data-testid=set-block_size]", "8")
    page.select_option("[data-testid=set-preemption]", "swap")
    page.fill("[data-testid=set-swap_blocks]", "5")
    page.click("[data-testid=apply]")
    message.filter(has_text="24 blocks of 8").wait_for()
    page.fill("[data-testid=set-seed]", "-1")
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelectorAll('[data-testid=block]').length === 24")
    assert page.evaluate("minipaged.dump().config.preemption") == "swap"
    assert swap_of(visualizer.thread.engine).space.pool.num_blocks == 5
    page.fill("[data-testid=prompt]", "Once upon a time")
    page.click("[data-testid=generate]")
    page.locator("[data-testid=message]").filter(has_text="seed").wait_for()
    # The message also appears beside the field, when the viewer leaves it and when a prompt is rejected.
    assert "Seed must be" in page.text_content("[data-testid=bad-seed]")
    assert page.get_attribute("[data-testid=set-seed]", "aria-invalid") == "true"
    page.click("[data-testid=settings]")
    for name, wrong, words in (
        ("top_k", "lots", "top_k must be a whole number of at least 0, not 'lots'"),
        ("repetition_penalty", "0", "repetition_penalty must be a number between 0.01 and 100, not 0"),
        ("presence_penalty", "1e", "presence_penalty must be a number between -100 and 100, not '1e'"),
        ("frequency_penalty", "1000", "frequency_penalty must be a number"),
        ("min_tokens", "2.5", "min_tokens must be a whole number of at least 0, not 2.5"),
        ("stop", "x" * 201, "201 characters"),
    ):
        page.fill("[data-testid=set-seed]", "")
        page.fill(f"[data-testid=set-{name}]", wrong)
        page.press(f"[data-testid=set-{name}]", "Tab")
        page.locator(f"[data-testid=bad-{name}]").filter(has_text=words).wait_for()
        page.fill(f"[data-testid=set-{name}]", "")
        page.press(f"[data-testid=set-{name}]", "Tab")
        page.locator(f"[data-testid=bad-{name}]").wait_for(state="hidden")
    page.fill("[data-testid=set-stop]", "the end\n\\n\\n")
    page.fill("[data-testid=set-num_blocks]", "1e")
    page.click("[data-testid=apply]")
    page.locator("[data-testid=bad-num_blocks]").filter(has_text="Num blocks must be").wait_for()
    page.keyboard.press("Escape")
    sent = visualizer.thread.submit
    visualizer.thread.submit = lambda arrival: arrivals.append(arrival) or sent(arrival)
    arrivals: list[Arrival] = []
    page.click("[data-testid=generate]")
    page.wait_for_function("Object.keys(minipaged.dump().seqs).length > 0")
    assert arrivals[0].stop == ("the end", "\n\n") and arrivals[0].seed is None
    page.evaluate("document.querySelector('[data-testid=set-stop]').value = ''")
    page.fill("[data-testid=prompt]", "Once upon a time")
    page.evaluate("document.querySelector('[data-testid=set-seed]').value = '7'")
    page.select_option("[data-testid=beams]", "3")
    page.click("[data-testid=generate]")
    page.wait_for_function("Object.keys(minipaged.dump().seqs).length > 2")
    assert page.is_disabled("[name=temperature]")


def test_a_conversation_finds_its_blocks_again(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve(stories_end=True)
    page = pages.open(visualizer)
    page.click("[data-testid=nav-chat]")
    assert page.is_hidden("[data-testid=rows]") and page.is_visible("[data-testid=pool]")
    for turn, question in enumerate(("What is a block table, and what is it good for?", "What is copy-on-write?")):
        page.fill("[data-testid=chat-text]", question)
        page.keyboard.press("Enter")
        page.wait_for_selector(f"[data-testid=answer][data-done] >> nth={turn}")
    notes = page.locator("[data-testid=cached]")
    assert notes.nth(0).text_content().startswith("turn 1: 0 of ")
    assert int(notes.nth(1).get_attribute("data-cached")) > 0 and "turn 2" in notes.nth(1).text_content()
    seqs = page.evaluate("minipaged.dump().seqs")
    assert seqs["1"]["tokens"][: len(seqs["0"]["tokens"]) - 4] == seqs["0"]["tokens"][:-4], "all turns are sent again"

    visualizer.thread.set_rate(5).result(20)
    page.fill("[data-testid=chat-text]", "Tell me a story about a dragon.")
    page.click("[data-testid=chat-send]")
    page.click("[data-testid=chat-stop]")
    page.wait_for_selector("[data-testid=answer][data-done] >> nth=2")
    assert "stopped" in notes.nth(2).text_content()
    page.click("[data-testid=chat-new]")
    assert page.locator("[data-testid=answer]").count() == 0
    page.click("[data-testid=nav-watch]")
    assert page.is_visible("[data-testid=rows]")


def test_a_new_run_takes_nobody_away_from_a_moment(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    mine, other = pages.open(visualizer), pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    steps(visualizer, 12)
    for page in (mine, other):
        caught_up(page, visualizer)
        page.keyboard.press("Home")
        page.wait_for_function("minipaged.player.position === minipaged.player.first")
        page.evaluate("minipaged.player.seek(3)")
    run, seen = visualizer.log.run, other.evaluate("minipaged.dump()")
    mine.select_option("[data-testid=scenario]", "prefix")  # one's own action leads the view to what it does
    mine.wait_for_function("run => minipaged.player.run !== run && minipaged.player.mode === 'live'", arg=run)
    assert mine.is_hidden("[data-testid=new-run]")
    other.wait_for_selector("[data-testid=new-run]")
    assert other.is_visible("[data-testid=narration]") and SCENARIOS["prefix"].name not in other.text_content(
        "[data-testid=lede]"
    )
    assert other.evaluate("minipaged.dump()") == seen and other.evaluate("minipaged.player.run") == run
    mine.wait_for_selector("[data-testid=quiz]")
    assert other.is_hidden("[data-testid=quiz]"), "its moment is not in view"
    other.click("[data-testid=keep-looking]")
    other.wait_for_selector("[data-testid=new-run]", state="hidden")
    assert other.evaluate("minipaged.dump()") == seen
    visualizer.thread.reset().result(20)
    other.wait_for_selector("[data-testid=new-run]")
    other.click("[data-testid=go-there]")
    other.wait_for_function("minipaged.player.mode === 'live'")
    caught_up(other, visualizer)


def test_a_question_is_hidden_while_the_view_is_elsewhere(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.select_option("[data-testid=scenario]", "prefix")
    page.wait_for_selector("[data-testid=quiz]")
    page.keyboard.press("Home")
    page.wait_for_selector("[data-testid=quiz]", state="hidden")
    page.keyboard.press("l")
    page.wait_for_selector("[data-testid=quiz]")
