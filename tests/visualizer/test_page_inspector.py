"""The page's inspector: blocks, sequences, tokens, forks and attention, compared with the engine."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.features.attention_view import attention
from tests.fake import swap_of
from tests.visualizer.test_page import caught_up, steps, submit
from visualizer.app import Visualizer, launch
from visualizer.scenarios import Arrival

ONE = Arrival(0, "Once upon a time, there was a dragon who", max_tokens=200, temperature=1.0, seed=4)
FOUR = Arrival(0, "In a small town by the sea, there lived a girl named Anna. She had a dog.", n=4, seed=2)


@pytest.fixture
def paused(serve: Callable[..., Visualizer], pages: Any) -> tuple[Visualizer, Any]:
    """A page with two requests, paused after 30 steps."""
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, [ONE, FOUR])
    steps(visualizer, 30)
    caught_up(page, visualizer)
    return visualizer, page


def engine_sequence(visualizer: Visualizer, seq_id: int) -> Any:
    requests = visualizer.thread.engine.scheduler.running
    return next(seq for request in requests for seq in request.seqs if seq.seq_id == seq_id)


def open_row(page: Any, seq_id: int) -> None:
    page.click(f"[data-testid=sequence][data-seq='{seq_id}'] .mp-badge")
    page.wait_for_selector("[data-testid=drawer]:not([hidden])")


def test_a_block_shows_its_tokens_its_owners_and_its_past(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    engine = visualizer.thread.engine
    block = engine.memory.tables[1][0]  # a block of the four samples' prompt
    page.click(f"[data-testid=block][data-block='{block}']")
    page.wait_for_selector("[data-testid=block-kind]:text-is('shared ×4')")
    tokens = page.eval_on_selector_all(
        "[data-testid=slot] [data-token-id]", "nodes => nodes.map(n => Number(n.dataset.tokenId))"
    )
    assert tokens == engine_sequence(visualizer, 1).tokens[:16]
    assert page.locator("[data-testid=block-owners] button").all_text_contents() == ["B", "C", "D", "E"]
    kinds = page.eval_on_selector_all("[data-testid=story] li", "items => items.map(i => i.dataset.kind)")
    assert kinds[-2:] == ["filled", "allocated"] and kinds.count("shared") == 3 and "cached" in kinds
    assert page.is_visible(f"[data-testid=block][data-block='{block}']"), "the drawer must not cover the clicked block"

    tail = engine.memory.tables[1][-1]  # a partly filled block
    page.click(f"[data-testid=block][data-block='{tail}']")
    page.wait_for_selector("[data-testid=block-kind]:text-is('owned')")
    filled = engine_sequence(visualizer, 1).num_computed % 16
    assert page.locator("[data-testid=slot] [data-token-id]").count() == filled
    page.click("[data-testid=close]")
    page.locator("[data-testid=drawer]").wait_for(state="hidden")


def test_tokens_and_slots_point_at_each_other(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    table = visualizer.thread.engine.memory.tables[0]
    open_row(page, 0)
    page.hover("[data-testid=runs] [data-go='token:0:18']")
    page.wait_for_selector(f"[data-block='{table[1]}'] .mp-marker[data-slot='{table[1]}:2']")
    cell = page.locator(f"[data-testid=block][data-block='{table[0]}']")
    cell.hover()  # shows a line below the pool, which may change the layout
    page.wait_for_selector("[data-testid=runs] .mp-marked")
    box = cell.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 5.5 / 16, box["y"] + box["height"] / 2)
    page.wait_for_selector("[data-testid=runs] .mp-marked[data-go='token:0:5']")


def test_the_keyboard_opens_walks_and_closes(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    page.focus("[data-testid=sequence][data-seq='0']")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-testid=close]:focus")
    for _ in range(3):  # fork, abort, the first block's chip
        page.keyboard.press("Tab")
    position = page.evaluate("minipaged.player.position")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator("[data-testid=token-facts]").filter(has_text="token id").wait_for()
    assert page.evaluate("minipaged.player.position") == position, "here, arrow keys select tokens"
    page.keyboard.press("Escape")
    page.locator("[data-testid=drawer]").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.dataset.seq") == "0"


def test_a_fork_by_click_shares_blocks_and_goes_on(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    engine = visualizer.thread.engine
    open_row(page, 0)
    kinds = page.eval_on_selector_all("[data-testid=budget] i", "parts => parts.map(part => part.dataset.kind)")
    assert kinds == ["decode"] * 5 and "5 decode + 0 prefill of 64 tokens" in page.text_content(".mp-budget")
    page.click("[data-testid=fork]")
    page.wait_for_selector("[data-testid=sequence][data-seq='5']")
    assert engine.memory.tables[5] == engine.memory.tables[0]
    assert set(engine.memory.pool.ref_counts[block] for block in engine.memory.tables[5]) == {2}
    page.locator("[data-testid=member][data-member='5']").filter(has_text="shares").wait_for()
    before = len(engine_sequence(visualizer, 5).tokens)
    steps(visualizer, 20)
    caught_up(page, visualizer)
    engine.check()
    child = engine_sequence(visualizer, 5)
    assert len(child.tokens) == before + 20
    shown = page.text_content("[data-testid=sequence][data-seq='5'] .mp-output")
    assert shown == child.text.text
    mine, parents = engine.memory.tables[5], engine.memory.tables[0]
    assert mine[0] == parents[0] and mine[-1] != parents[-1]

    page.click("[data-testid=member][data-member='5'] button")
    page.click("[data-testid=abort]")
    page.wait_for_selector("[data-testid=sequence-kind]:text-is('aborted')")
    assert 5 not in engine.memory.tables and page.is_hidden("[data-testid=abort]")
    open_row(page, 1)
    page.wait_for_selector("[data-testid=sequence-kind]:text-is('running')")
    assert page.is_disabled("[data-testid=fork]") and "one running sequence" in page.get_attribute(
        "[data-testid=fork]", "title"
    )
    with pytest.raises(InvalidRequest, match="one sequence"):
        visualizer.thread.fork("request-1").result(20)
    assert page.text_content("[data-testid=abort]") == "Abort all 4"
    page.click("[data-testid=abort]")
    page.wait_for_selector("[data-testid=sequence-kind]:text-is('aborted')")
    assert not set(engine.memory.tables) & {1, 2, 3, 4}


def test_a_token_tells_its_odds_and_what_it_looked_at(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    engine = visualizer.thread.engine
    seq = engine_sequence(visualizer, 0)
    position = seq.num_prompt + 14
    open_row(page, 0)
    page.click(f"[data-testid=runs] [data-go='token:0:{position}']")
    page.wait_for_selector("[data-testid=attention-block]")
    expected = seq.logprobs[14]
    chosen = seq.tokens[position]
    facts = page.text_content("[data-testid=token-facts]")
    assert f"{expected[chosen]:.4f}" in facts and f"block {engine.memory.tables[0][position // 16]}" in facts
    odds = page.eval_on_selector_all("[data-testid=odd]", "items => items.map(i => Number(i.dataset.tokenId))")
    assert set(odds) == set(expected)
    assert page.locator("[data-testid=odd].mp-chosen").get_attribute("data-token-id") == str(chosen)

    before = engine.block_tables()
    weights = visualizer.thread.call(lambda: attention(engine, 0, position)).result(20)
    shown = "minipaged.inspector.views.token.view.attention.shown"
    for layer, head, right in (
        ("mean", "mean", weights.mean(dim=(0, 1))),
        ("1", "mean", weights[1].mean(dim=0)),
        ("2", "3", weights[2, 3]),
    ):
        page.select_option("[data-testid=attention-layer]", layer)
        page.select_option("[data-testid=attention-head]", head)
        values = torch.tensor(page.evaluate(shown))
        torch.testing.assert_close(values, right, atol=1e-5, rtol=1e-4)
        assert abs(values.sum().item() - 1) < 1e-4
    blocks = page.eval_on_selector_all("[data-testid=attention-block]", "b => b.map(x => Number(x.dataset.physical))")
    assert blocks == engine.memory.tables[0][: position // 16 + 1]
    heated = page.eval_on_selector_all(".mp-heat", "n => n.map(x => Number(x.closest('[data-block]').dataset.block))")
    assert heated == blocks, "the pool shows the weights on the keys' blocks"
    assert "q(" in page.text_content("[data-testid=attention-words]")
    assert engine.block_tables() == before

    visualizer.thread.abort("request-0").result(20)
    caught_up(page, visualizer)
    assert page.evaluate(shown), "captured weights stay"
    assert page.locator(".mp-heat").count() == 0, "freed blocks show no weights"
    page.click("nav >> text=sequence A")
    page.click(f"[data-testid=runs] [data-go='token:0:{position - 1}']")
    page.locator("[data-testid=attention-words]").filter(has_text="given its blocks back").wait_for()


@pytest.fixture
def swapping(free_port: int) -> Iterator[Visualizer]:
    llm = LLM("tiny", num_blocks=10, block_size=16, max_num_seqs=8, preemption="swap", swap_blocks=16)
    visualizer = launch(llm, port=free_port, scenario=None, rate=None, block=False)
    yield visualizer
    visualizer.close()


def test_who_is_swapped_out_lives_on_the_cpu(swapping: Visualizer, pages: Any) -> None:
    page = pages.open(swapping)
    swapping.thread.pause().result(20)
    engine = swapping.thread.engine
    for name in ("a", "b"):
        params = SamplingParams(max_tokens=120, ignore_eos=True, seed=1)
        swapping.thread.call(lambda name=name, params=params: engine.add_request(name, [5] * 40, params)).result(20)
    while not swap_of(engine).requests_out:
        steps(swapping, 1)
    caught_up(page, swapping)
    ((seq, table),) = swap_of(engine).space.tables.items()
    row = page.locator(f"[data-testid=sequence][data-seq='{seq}']")
    assert row.get_attribute("data-state") == "swapped"
    assert row.locator("[data-swap]").evaluate_all("n => n.map(x => Number(x.dataset.swap))") == table
    assert "1" in page.text_content("[data-testid=queue-swapped]")
    row.click()
    page.locator("[data-testid=place]").first.filter(has_text=f"0→CPU {table[0]}").wait_for()
    page.locator("[data-testid=place]").first.click()
    page.wait_for_selector(f"[data-testid=drawer] h3:has-text('Block {table[0]} on the CPU')")


def test_the_drawer_fits(paused: tuple[Visualizer, Any]) -> None:
    _, page = paused
    open_row(page, 0)
    for width, height in ((1280, 720), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert size == [width, height]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
