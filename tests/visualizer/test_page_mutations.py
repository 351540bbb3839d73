"""The browser's cost of a step: the page updates only what the step changed, and rebuilds no elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.visualizer.test_page import STORIES, caught_up, steps, submit
from visualizer.app import Visualizer

WATCH = """() => {
    window.seen = [];
    const watching = new MutationObserver((records) => seen.push(records));  // what one frame changed
    const everything = { subtree: true, childList: true, attributes: true, characterData: true };
    watching.observe(document.querySelector(".mp"), everything);
}"""
# Changes per frame without plotly's, which draws a few times per second; changed blocks of the pool; added nodes.
SINCE = """() => {
    const element = (node) => (node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement);
    const ours = ({ target }) => !element(target)?.closest(".mp-charts");
    const frames = seen.splice(0).map((records) => records.filter(ours));
    const changes = frames.flat();
    const cells = new Set(changes.map(({ target }) => element(target)?.closest(".mp-cell")).filter(Boolean));
    const nodes = changes.reduce((sum, { addedNodes }) => sum + addedNodes.length, 0);
    return [frames.map((frame) => frame.length), cells.size, nodes];
}"""


def num_blocks(visualizer: Visualizer) -> int:
    return len(set().union(*visualizer.thread.engine.block_tables().values()))


def test_a_step_changes_only_what_it_is_about(serve: Callable[..., Visualizer], pages: Any) -> None:
    """Seven sequences get a token each, and sometimes a block. Measured: 136 to 177 changes per step, and 8 to 17 new
    nodes. The bound is twice that; redrawing all blocks or rebuilding rows exceeds it by far. A busy machine may draw
    a step in more than one frame, so the bound applies to each frame."""
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    steps(visualizer, 12)
    caught_up(page, visualizer)
    texts = sum(arrival.n for arrival in STORIES)
    assert page.locator("[data-testid=sequence]").count() == texts
    page.evaluate(WATCH)
    for _ in range(10):
        before = num_blocks(visualizer)
        steps(visualizer, 1)
        caught_up(page, visualizer)
        new = num_blocks(visualizer) - before
        changes, cells, nodes = page.evaluate(SINCE)
        assert sum(changes) > 10 * texts and max(changes) < 50 * texts
        assert texts <= cells <= texts + 2 * new, "only blocks with new tokens and new or full blocks change"
        assert nodes < 5 * texts
