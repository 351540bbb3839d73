"""Speculation on the page: draft tokens, rejected tokens, and the blocks that they free."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.visualizer.test_page import as_json, caught_up, finish, recorded
from tests.visualizer.test_page_scene import drawn, seek
from visualizer.app import Visualizer
from visualizer.scenarios import SCENARIOS


def test_wrong_guesses_are_struck_and_their_blocks_are_free(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.reset(replace(SCENARIOS["speculation"], asks=False)).result(60)
    finish(visualizer)
    assert caught_up(page, visualizer) == as_json(visualizer.log.state), "the reducers disagree"
    number, told = next(
        (number, {event["type"]: event for event in record if event.get("seq_id") == wrong["seq_id"]})
        for number, record in enumerate(recorded(visualizer)[1])
        for wrong in record
        if [event["type"] for event in record].count("speculated") == 1
        and wrong["type"] == "speculated"
        and wrong["accepted"] < wrong["proposed"]
        and wrong["blocks"]
    )
    seq, guesses, spoken = told["speculated"]["seq_id"], told["proposed"]["pieces"], told["speculated"]
    seek(page, number + 1)
    guess = page.locator(f"[data-testid=sequence][data-seq='{seq}'] [data-testid=guess]")
    wrong = re.sub(r"<\|\w+\|>", " ", "".join(guesses[spoken["accepted"] :]))  # special tokens are not shown
    assert guess.inner_text().split() == wrong.split() != []
    assert guess.evaluate("node => getComputedStyle(node).textDecorationLine") == "line-through"
    for block in spoken["blocks"]:
        assert page.get_attribute(f"[data-testid=block][data-block='{block}']", "data-refs") == "0"
    assert f"{len(guesses)} guessed" in page.text_content("[data-part=budget-text]")
    assert page.get_attribute("[data-testid=narration]", "data-kind") == "speculation"
    assert "taken back, and" in page.text_content("[data-testid=narration]")
    # Event by event: first the draft follows the sequence's tokens, then its rejected tokens are struck through.
    events = recorded(visualizer)[1][number]
    for kind, event in (("proposed", told["proposed"]), ("taken", spoken)):
        page.evaluate("at => minipaged.player.seek(...at)", [number, events.index(event) + 1])
        drawn(page)
        assert guess.text_content() and guess.get_attribute("data-kind") == kind
