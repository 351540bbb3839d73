"""Memory managers other than the paged one: chosen in the page's settings, and drawn correctly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minipaged.config import BATCHINGS, MANAGERS
from tests.visualizer.test_page import STORIES, as_json, caught_up, replayed, steps, submit
from visualizer.app import Visualizer
from visualizer.scenarios import Arrival
from visualizer.sources import sources

LONG = [
    Arrival(0, "Once upon a time", max_tokens=64, seed=1),
    Arrival(0, "It was a cold night and", max_tokens=60, seed=2),
]


def apply(page: Any, **choices: str) -> str:
    """Chooses settings in the drawer, restarts the engine, and returns the message."""
    page.click("[data-testid=settings]")
    for name, value in choices.items():
        page.select_option(f"[data-testid=set-{name}]", value)
    page.click("[data-testid=apply]")
    message = page.locator("[data-testid=engine-message]:is([data-kind=good], [data-kind=bad])")
    message.wait_for()
    words = message.inner_text()
    page.click("[data-testid=settings-close]")
    return words


def test_the_settings_offer_all_managers_and_batchings(serve: Callable[..., Visualizer], pages: Any) -> None:
    page = pages.open(serve())
    options = "all => all.map(option => option.value)"
    assert page.eval_on_selector_all("[data-testid=set-memory] option", options) == list(MANAGERS)
    assert page.eval_on_selector_all("[data-testid=set-batching] option", options) == list(BATCHINGS)


def test_contiguous_memory_is_drawn_as_set_aside_and_filled(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    assert "orca-pow2, in static batches" in apply(page, memory="orca-pow2", batching="static")
    config = visualizer.thread.engine.config
    assert (config.memory, config.batching) == ("orca-pow2", "static")
    visualizer.thread.pause().result(20)
    submit(visualizer, LONG)
    steps(visualizer, 20)
    assert caught_up(page, visualizer) == as_json(replayed(visualizer, visualizer.log.end))
    tables = visualizer.thread.call(lambda: visualizer.thread.engine.block_tables()).result(20)
    page.wait_for_selector("[data-testid=block][data-kind=reserved]")
    cells = page.eval_on_selector_all(
        "[data-testid=block]", "all => all.map(cell => [cell.dataset.kind, Number(cell.dataset.fill)])"
    )
    computed = {seq_id: replayed(visualizer, visualizer.log.end).seqs[seq_id].num_computed for seq_id in tables}
    for seq_id, table in tables.items():
        fills = [max(0, min(16, computed[seq_id] - 16 * logical)) for logical in range(len(table))]
        assert [cells[block] for block in table] == [["owned" if fill else "reserved", fill] for fill in fills]
        assert "reserved" in [cells[block][0] for block in table]
    taken = sum(map(len, tables.values()))
    empty = [kind for kind, _ in cells].count("reserved")
    said = f"orca-pow2: {taken} taken, {empty} of them empty · {len(cells) - taken} free"
    assert page.inner_text("[data-testid=pool-count]") == said
    assert page.is_visible(".mp-legend .mp-key.mp-reserved") and not page.is_visible(".mp-legend .mp-key.mp-cached")
    columns = page.eval_on_selector("[data-testid=pool]", "grid => Number(grid.style.getPropertyValue('--columns'))")
    assert columns >= 4 and columns & (columns - 1) == 0, "the columns must be a power of two"

    page.click("[data-testid=tab-waste]")
    page.wait_for_selector("[data-manager=orca-pow2].mp-w-seen")
    titles = page.eval_on_selector_all("[data-manager]", "all => all.map(row => [row.dataset.manager, row.title])")
    assert [name for name, title in titles if "what you see above" in title] == ["orca-pow2"]


def test_narration_names_the_managers_own_functions(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    apply(page, memory="orca-oracle")
    visualizer.thread.pause().result(20)
    submit(visualizer, STORIES[1:2])  # four samples, whose forks copy into the group's chunks
    steps(visualizer, 3)
    caught_up(page, visualizer)
    page.keyboard.press("Home")
    seen: dict[str, str] = {}
    for _ in range(120):
        page.keyboard.press("Shift+ArrowRight")
        page.wait_for_function("!minipaged.player.changed")
        if page.is_visible("[data-testid=source]"):
            seen[page.get_attribute("[data-testid=source]", "data-source")] = page.inner_text("[data-testid=source]")
        if "copied" in seen:
            break
    assert seen["allocated"].startswith("ContiguousTables.own") and seen["copied"].startswith("ContiguousTables.move")
    own = sources()["managers"]["orca-oracle"]["copied"]
    assert seen["copied"].endswith(f"contiguous_tables.py:{own['line']}")


def test_what_does_not_go_together_cannot_be_set_and_is_refused(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.click("[data-testid=settings]")
    page.select_option("[data-testid=set-preemption]", "swap")
    page.select_option("[data-testid=set-memory]", "orca-max")
    assert page.input_value("[data-testid=set-preemption]") == "recompute"
    for name in ("preemption", "swap_blocks", "enable_prefix_caching"):
        assert page.is_disabled(f"[data-testid=set-{name}]")
    page.select_option("[data-testid=set-memory]", "paged")
    assert page.is_enabled("[data-testid=set-preemption]")
    assert page.is_checked("[data-testid=set-enable_prefix_caching]")
    page.click("[data-testid=settings-close]")
    run = visualizer.log.run
    answer = page.evaluate(
        """() => minipaged.send({ do: "configure", memory: "orca-max", enable_prefix_caching: true })"""
    )
    assert not answer["ok"] and "neither shares prefixes nor preempts" in answer["message"]
    assert visualizer.log.run == run and visualizer.thread.engine.config.memory == "paged"


@pytest.mark.parametrize("memory", MANAGERS)
def test_texts_are_written_under_every_manager(memory: str, serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    said = apply(page, memory=memory)
    if "Restarted" not in said:  # vAttention requires Linux
        assert memory == "vattention" and visualizer.thread.engine.config.memory == "paged"
    page.fill("[data-testid=max-tokens]", "12")
    page.fill("[data-testid=prompt]", "Once upon a time")
    page.click("[data-testid=generate]")
    page.wait_for_function("minipaged.player.state.finished.length === 1")
    page.evaluate("minipaged.check()")
    assert page.evaluate("minipaged.player.head.config.memory") == visualizer.thread.engine.config.memory
