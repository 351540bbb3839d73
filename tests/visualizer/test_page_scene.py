"""The main scene in a real browser, compared with the engine: the tree of sequences, tokens and slots, prefix cache
hits, the timeline's lanes, blocks on the CPU, and small screens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged import LLM, SamplingParams
from minipaged.events import load_recording
from tests.fake import swap_of
from tests.visualizer.test_page import STORIES, caught_up, finish, recorded, steps, submit
from visualizer.app import Visualizer
from visualizer.recordings import FOLDER
from visualizer.scenarios import OPENING, SCENARIOS, Arrival

GOLDEN = sorted(FOLDER.glob("*.jsonl"))
LANES = {
    "forked": "fork", "copied": "copy-on-write", "preempted": "preemption", "swapped_out": "swap",
    "swapped_in": "swap", "finished": "finish",
}  # fmt: skip
SHARED = "You answer every question about memory in one or two short sentences, with simple words, and never sing."
PROMPTS = [
    Arrival(0, question, system=SHARED, chat=True, max_tokens=30) for question in ("What is a block?", "And a page?")
]


@pytest.fixture
def paused(serve: Callable[..., Visualizer], pages: Any) -> tuple[Visualizer, Any]:
    """`STORIES`, paused after 30 steps: A alone, B to E four samples of one prompt, F and G two of another."""
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer)
    steps(visualizer, 30)
    caught_up(page, visualizer)
    return visualizer, page


def drawn(page: Any) -> None:
    page.wait_for_function("!minipaged.player.changed")


def seek(page: Any, position: int) -> None:
    page.evaluate("position => minipaged.player.seek(position)", position)
    drawn(page)


def tree(page: Any) -> list[list[Any]]:
    """[sequence, parent's row, depth, kinds of its tree lines] for every row, from the top."""
    return page.eval_on_selector_all(
        "[data-testid=sequence]",
        """rows => rows.map((row) => [
            Number(row.dataset.seq), row.dataset.parent === "" ? null : Number(row.dataset.parent),
            Number(row.dataset.depth), [...row.querySelectorAll("[data-rail]")].map((rail) => rail.dataset.rail)])""",
    )


def place(page: Any, seq: int, token: int) -> tuple[float, float]:
    """The position (x, y) in the window of an output token in a row."""
    x, y = page.evaluate(
        """([id, token]) => {
            const seq = minipaged.player.state.seqs[id];
            const node = document.querySelector(`[data-testid=sequence][data-seq='${id}'] .mp-output`).firstChild;
            const range = document.createRange();
            range.setStart(node, seq.pieces.slice(seq.num_prompt, token).join("").length);
            range.setEnd(node, seq.pieces.slice(seq.num_prompt, token + 1).join("").length);
            const box = range.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];
        }""",
        [seq, token],
    )
    return x, y


def highlighted(page: Any, name: str) -> list[str]:
    """The texts that the browser highlights under ``name``."""
    return page.evaluate("name => [...(CSS.highlights.get(name) ?? [])].map(String)", name)


# --- the tree ---------------------------------------------------------------------------------------------------


def test_children_stand_under_their_parents_even_those_that_have_ended(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    assert tree(page) == [
        [0, None, 0, []],
        [1, None, 0, ["stem"]], [2, 1, 1, ["tee"]], [3, 1, 1, ["tee"]], [4, 1, 1, ["end"]],
        [5, None, 0, ["stem"]], [6, 5, 1, ["end"]],
    ]  # fmt: skip
    lefts = page.eval_on_selector_all(".mp-badge", "badges => badges.map(b => b.getBoundingClientRect().left)")
    assert lefts[2] - lefts[1] == lefts[6] - lefts[5] > 10 and lefts[0] == lefts[1]
    visualizer.thread.fork("request-0").result(20)
    steps(visualizer, 3)
    visualizer.thread.abort("request-0").result(20)
    caught_up(page, visualizer)
    assert tree(page)[:2] == [[0, None, 0, ["stem"]], [7, 0, 1, ["end"]]]
    row = "[data-testid=sequence][data-seq='{}']"
    assert page.get_attribute(row.format(0), "data-state") == "finished"
    assert page.get_attribute(row.format(7), "data-state") == "running"
    assert page.get_attribute(row.format(7), "aria-label") == "sequence H, a child of A"
    shown = tree(page)
    seek(page, visualizer.log.end - 12)
    assert [0, None, 0, []] in tree(page)
    seek(page, visualizer.log.end)
    assert tree(page) == shown


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_the_tree_follows_from_the_state_at_any_moment(
    path: Path, launching: Callable[..., Visualizer], pages: Any
) -> None:
    """Preemptions, swaps and pruned beams do not change parents in the tree."""
    page = pages.open(launching(replay=path))
    end = page.evaluate("minipaged.player.end")
    seen = {}
    for position in [*range(1, end, 9), *range(end, 1, -13)]:
        seek(page, position)
        state = page.evaluate("minipaged.dump()")
        rows = tree(page)
        ids = [row[0] for row in rows]
        live = {int(seq) for seq, value in state["seqs"].items() if not value["finish_reason"]}
        assert live <= set(ids) and len(ids) == len(set(ids)) <= len(live) * 3 + 15
        for index, (seq, parent, depth, rails) in enumerate(rows):
            elder = state["seqs"][str(seq)]["parent"]
            if seq in live and elder is not None:
                assert parent == elder, "a live sequence must be below its parent"
            while elder is not None and elder not in ids:
                elder = state["seqs"][str(elder)]["parent"]
            assert parent == elder
            assert depth == (0 if parent is None else rows[ids.index(parent)][2] + 1)
            assert parent is None or parent in ids[:index]
            has_children = any(other == seq for _, other, _, _ in rows)
            assert len(rails) == depth + has_children and (rails[-1:] == ["stem"]) == has_children
        assert seen.setdefault(position, rows) == rows
    forks = [event for event in load_recording(path) if event.type == "forked"]
    assert forks and any(row[2] > 0 for rows in seen.values() for row in rows)


# --- tokens and slots -------------------------------------------------------------------------------------------


def test_a_token_of_a_row_shows_its_slot_and_opens(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    table = visualizer.thread.engine.memory.tables[0]
    pieces = page.evaluate("minipaged.dump().seqs[0].pieces")
    for token in (18, 24, 30):
        page.mouse.move(*place(page, 0, token))
        slot = f"{table[token // 16]}:{token % 16}"
        page.wait_for_selector(f"[data-block='{table[token // 16]}'].mp-lit .mp-marker[data-slot='{slot}']")
        assert page.locator("[data-testid=block].mp-lit").count() == 1
        chips = page.locator("[data-testid=chip].mp-lit")
        assert chips.evaluate_all("chips => chips.map(c => Number(c.dataset.chip))") == [table[token // 16]]
        assert highlighted(page, "mp-slot") == [pieces[token]]
    assert page.locator("[data-testid=sequence][data-seq='0'] .mp-line *").count() == 3, "no element per token"
    page.mouse.click(*place(page, 0, 24))
    facts = page.locator("[data-testid=token-facts]").filter(has_text="position24")
    facts.filter(has_text=f"block {table[1]}, slot 8").wait_for()
    assert str(page.evaluate("minipaged.dump().seqs[0].tokens[24]")) in facts.text_content()
    page.keyboard.press("Escape")
    page.click("[data-testid=sequence][data-seq='0'] .mp-badge")
    page.wait_for_selector("[data-testid=runs]")


def test_a_block_shows_its_words_in_every_row(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    tables = visualizer.thread.engine.memory.tables
    seqs = page.evaluate("minipaged.dump().seqs")
    for block, sharers in ((tables[1][0], "1234"), (tables[0][1], "0"), (tables[6][-1], "6")):
        cell = page.locator(f"[data-testid=block][data-block='{block}']")
        box = cell.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 3.5 / 16, box["y"] + box["height"] / 2)
        page.wait_for_selector(f"[data-block='{block}'].mp-lit")
        drawn(page)
        texts = []
        for seq in sharers:
            first = 16 * tables[int(seq)].index(block)
            texts.append("".join(seqs[seq]["pieces"][first : min(first + 16, seqs[seq]["num_computed"])]))
        clean = [text.replace("<|endoftext|>", "").strip() for text in texts]
        assert [text.strip() for text in highlighted(page, "mp-block")] == clean and all(clean)
        third = [seqs[seq]["pieces"][16 * tables[int(seq)].index(block) + 3] for seq in sharers]
        assert highlighted(page, "mp-slot") == third
        inside = page.evaluate("""() => [...CSS.highlights.get("mp-slot")].every((range) => {
            const line = range.startContainer.parentElement.closest(".mp-line").getBoundingClientRect();
            const word = range.getBoundingClientRect();
            return word.left >= line.left - 1 && word.right <= line.right + 1;
        })""")
        assert inside, "the row must scroll to the tokens"
        arrows = page.eval_on_selector_all(".mp-arrows path", "paths => paths.map(p => Number(p.dataset.block))")
        assert arrows == [block] * len(sharers)
    page.mouse.move(2, 2)
    page.wait_for_function("!CSS.highlights.has('mp-block') && !CSS.highlights.has('mp-slot')")


def test_the_newest_token_lands_in_its_slot(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    engine = visualizer.thread.engine

    def landed() -> dict[int, str]:
        found = page.eval_on_selector_all(
            ".mp-landed", "nodes => nodes.map(n => [Number(n.closest('[data-block]').dataset.block), n.dataset.slots])"
        )
        return dict(found)

    def newest() -> dict[int, str]:
        slots = {}
        for request in engine.scheduler.running:
            for seq in request.seqs:
                offset = (seq.num_computed - 1) % 16
                slots[engine.memory.tables[seq.seq_id][(seq.num_computed - 1) // 16]] = f"{offset}-{offset + 1}"
        return slots

    falls = "nodes => nodes.map((node) => getComputedStyle(node).animationName)"
    for _ in range(3):
        page.wait_for_timeout(100)  # with faster steps, the page skips the animation
        steps(visualizer, 1)
        caught_up(page, visualizer)
        assert landed() == newest() and len(newest()) == 7
        assert "none" not in page.eval_on_selector_all(".mp-landed", falls)
    page.emulate_media(reduced_motion="reduce")
    page.wait_for_timeout(100)
    steps(visualizer, 1)
    caught_up(page, visualizer)
    assert landed() == newest() and set(page.eval_on_selector_all(".mp-landed", falls)) == {"none"}


# --- the prefix cache -------------------------------------------------------------------------------------------


def test_a_find_in_the_prefix_cache_is_seen(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, PROMPTS[:1])
    steps(visualizer, 6)
    caught_up(page, visualizer)
    submit(visualizer, PROMPTS[1:])
    steps(visualizer, 1)
    page.wait_for_function("end => minipaged.player.position === end", arg=visualizer.log.end)
    drawn(page)
    assert page.evaluate(
        "minipaged.player.restedAt.hit > 0 && minipaged.player.restUntil >= minipaged.player.restedAt.hit"
    )
    found = [event for event in recorded(visualizer)[1][-1] if event.get("reason") == "prefix"]
    (tokens,) = [event["num_cached"] for event in recorded(visualizer)[1][-1] if event["type"] == "admitted"]
    assert len(found) * 16 == tokens > 0
    assert page.get_attribute("[data-testid=narration]", "data-kind") == "prefix cache"
    assert f"{tokens} tokens from the cache" in page.text_content("[data-testid=narration]")
    arrows = page.eval_on_selector_all(
        ".mp-arrows path[data-kind=found]", "paths => paths.map(p => Number(p.dataset.block)).sort((a, b) => a - b)"
    )
    assert arrows == sorted(event["block"] for event in found)
    hit = page.locator("[data-testid=sequence][data-seq='1'] [data-testid=hit]")
    assert hit.text_content() == f"{tokens} tokens from the cache" and hit.is_visible()
    table = page.locator("[data-testid=sequence][data-seq='1'] [data-testid=table]").bounding_box()
    assert hit.bounding_box()["x"] >= table["x"] + table["width"], "the badge must not cover table entries"
    chips = page.locator("[data-testid=sequence][data-seq='1'] .mp-found")
    assert chips.evaluate_all("c => c.map(x => Number(x.dataset.chip))") == [event["block"] for event in found]
    assert page.locator("[data-testid=sequence][data-seq='0'] [data-testid=hit]").is_hidden()
    at = visualizer.log.end
    seek(page, at - 1)
    assert page.locator("[data-testid=hit]:visible").count() == 0
    seek(page, at)
    assert hit.is_visible()


def test_a_cached_block_tells_the_chain_of_its_names(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    submit(visualizer, PROMPTS)
    finish(visualizer)
    caught_up(page, visualizer)
    cached = {
        event["prefix"]: event for record in recorded(visualizer)[1] for event in record if event["type"] == "cached"
    }
    names = max(([name] for name in cached), key=lambda chain: _extend(chain, cached))
    _extend(names, cached)
    assert len(names) > 2 and cached[names[-1]]["parent"] == 0
    page.click(f"[data-testid=block][data-block='{cached[names[0]]['block']}']")
    links = page.locator("[data-testid=chain] button")
    links.nth(len(names) - 1).wait_for()
    assert links.evaluate_all("b => b.map(x => Number(x.dataset.name))") == names
    assert "a text begins" in page.text_content("[data-testid=chain]")
    parent = cached[names[1]]["block"]
    links.nth(1).hover()
    page.wait_for_selector(f"[data-testid=block][data-block='{parent}'].mp-lit")
    links.nth(1).click()
    page.locator("[data-testid=drawer] h3").filter(has_text=f"Block {parent}").first.wait_for()
    assert links.evaluate_all("b => b.map(x => Number(x.dataset.name))") == names[1:]
    assert page.locator("[data-testid=story] li").count() > 1


def _extend(chain: list[int], cached: dict[int, Any]) -> int:
    """Extends the chain from its last prefix through the parents to the root. Returns the chain's length."""
    while cached[chain[-1]]["parent"]:
        chain.append(cached[chain[-1]]["parent"])
    return len(chain)


# --- the timeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_every_kind_of_event_has_its_mark_in_its_lane(
    path: Path, launching: Callable[..., Visualizer], pages: Any
) -> None:
    page = pages.open(launching(replay=path))
    records = page.evaluate("minipaged.player.records.map((r) => ({ events: r.events, marks: r.marks }))")
    lanes = page.eval_on_selector_all("[data-testid=lanes] [data-lane]", "items => items.map(i => i.dataset.lane)")
    config = page.evaluate("minipaged.dump().config")
    assert ("swap" in lanes) == (config["swap_blocks"] > 0) and ("cache hit" in lanes) == config[
        "enable_prefix_caching"
    ]
    expected = []
    for record in records:
        kinds = {LANES[event["type"]] for event in record["events"] if event["type"] in LANES}
        if any(event["type"] == "admitted" and event["num_cached"] for event in record["events"]):
            kinds.add("cache hit")
        expected.append(sorted(kinds))
    assert max(map(len, expected)) > 1 or path == GOLDEN[0], "some records need several marks"
    coloured = page.evaluate(
        """([records, lanes]) => {
            const canvas = document.querySelector("[data-part=ticks]"), pen = canvas.getContext("2d");
            return records.map((_, index) => lanes.filter((name, lane) => {
                const x = Math.round(((index + 1) / records.length) * (canvas.width - 14) + 6) + 1;
                const y = Math.round((lane * canvas.height) / lanes.length) + 1;
                return pen.getImageData(x, y, 1, 1).data[3] > 0;
            }));
        }""",
        [records, lanes],
    )
    for index, kinds in enumerate(expected):
        assert set(kinds) <= set(coloured[index]), "a mark is missing (neighbours may add some)"
    assert not any(coloured[index] for index in range(1, len(expected) - 1) if not any(expected[index - 1 : index + 2]))
    busiest = max(range(len(expected)), key=lambda index: len(expected[index]))
    seek(page, busiest + 1)
    spoken = page.get_attribute("[data-testid=scrub]", "aria-valuetext")
    assert all(kind in spoken for kind in expected[busiest])
    box = page.locator("[data-testid=scrub]").bounding_box()
    page.mouse.move(box["x"] + 7 + (busiest + 1) / len(expected) * (box["width"] - 14), box["y"] + 3)
    tip = page.locator("[data-testid=tip] b")
    tip.filter(has_text=expected[busiest][0]).wait_for()
    assert all(kind in tip.text_content() for kind in expected[busiest])
    bold = page.eval_on_selector_all("[data-testid=lanes] .mp-here", "items => items.map(i => i.dataset.lane)")
    assert sorted(bold) == expected[busiest]


# --- the CPU ----------------------------------------------------------------------------------------------------


def test_blocks_on_the_cpu_are_seen_and_opened(launching: Callable[..., Visualizer], pages: Any) -> None:
    llm = LLM("tiny", num_blocks=12, block_size=16, max_num_seqs=8, preemption="swap", swap_blocks=16)
    visualizer = launching(llm, rate=None)
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    engine = visualizer.thread.engine
    for name, n in (("a", 1), ("b", 3)):  # the second request's sequences also share their prompt's blocks on the CPU
        params = SamplingParams(n=n, max_tokens=90, ignore_eos=True, seed=1, temperature=1.0)
        visualizer.thread.call(lambda name=name, params=params: engine.add_request(name, [5] * 40, params)).result(20)
    while not swap_of(engine).requests_out:
        steps(visualizer, 1)
    caught_up(page, visualizer)
    swapped = {seq: list(table) for seq, table in swap_of(engine).space.tables.items()}
    assert len(swapped) == 3 and swapped[1][0] == swapped[2][0]
    seqs = {seq.seq_id: seq for request in swap_of(engine).requests_out for seq in request.seqs}
    expected = {}
    for seq, table in swapped.items():
        for logical, block in enumerate(table):
            fill = min(16, seqs[seq].num_computed - 16 * logical)
            expected[block] = [expected.get(block, [0])[0] + 1, max(fill, expected.get(block, [0, 0])[1])]
    cells = page.eval_on_selector_all(
        "[data-testid=swap-block]", "cells => cells.map(c => [Number(c.dataset.refs), Number(c.dataset.fill)])"
    )
    assert cells == [expected.get(block, [0, 0]) for block in range(16)]
    shared, own = swapped[1][0], swapped[2][-1]
    cell = "[data-testid=swap-block][data-swap-block='{}']"
    assert page.text_content(cell.format(shared)) == "B×3" and page.text_content(cell.format(own)) == "C"
    width = "[...document.querySelectorAll('.mp-swapcell .mp-ink')].map((n) => n.getBoundingClientRect().width)"
    widths = page.evaluate(width)
    assert widths[shared] > widths[own] * 16 / (expected[own][1] + 1) > 0

    page.hover(cell.format(own))
    page.wait_for_selector(f"[data-swap='{own}'].mp-lit")
    bright = page.eval_on_selector_all("[data-testid=sequence]:not(.mp-dim)", "r => r.map(x => Number(x.dataset.seq))")
    assert bright == [2]
    page.click(cell.format(own))
    page.locator("[data-testid=drawer] h3").filter(has_text=f"Block {own} on the CPU").wait_for()
    tokens = page.eval_on_selector_all(
        "[data-testid=slot] [data-token-id]", "nodes => nodes.map(n => Number(n.dataset.tokenId))"
    )
    logical = len(swapped[2]) - 1
    assert tokens == seqs[2].tokens[16 * logical : seqs[2].num_computed] and len(tokens) == expected[own][1]
    assert page.locator("[data-testid=block-owners] button").all_text_contents() == ["C"]
    page.locator("[data-testid=story]").filter(has_text="takes what C had in block").wait_for()
    page.keyboard.press("Escape")

    page.focus(cell.format(0))
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    position = page.evaluate("minipaged.player.position")
    assert page.evaluate("document.activeElement.dataset.swapBlock") == "3"
    page.keyboard.press("Enter")
    page.locator("[data-testid=drawer] h3").filter(has_text="Block 3 on the CPU").wait_for()
    assert page.evaluate("minipaged.player.position") == position, "here, arrow keys select blocks"


# --- words ------------------------------------------------------------------------------------------------------


def test_a_recording_hides_what_is_live(serve: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = serve()
    page = pages.open(visualizer)
    page.select_option("[data-testid=scenario]", "samples")
    page.locator("[data-testid=choice]:enabled").first.wait_for()
    page.set_input_files("[data-testid=file]", GOLDEN[0])
    page.wait_for_function("minipaged.player.recording")
    page.locator("[data-testid=quiz]").wait_for(state="hidden")
    page.keyboard.press("1")
    assert page.is_visible("[data-testid=narration]") and visualizer.thread._question is not None
    lede = page.text_content("[data-testid=lede]")
    assert lede.startswith(GOLDEN[0].name) and SCENARIOS["samples"].watch[:30] not in lede
    assert page.input_value("[data-testid=scenario]") == "" and page.is_hidden("[data-testid=scenario]")
    page.click("[data-testid=leave]")
    page.locator("[data-testid=quiz]").wait_for()
    page.locator("[data-testid=lede]").filter(has_text=SCENARIOS["samples"].watch[:60]).wait_for()
    assert page.input_value("[data-testid=scenario]") == "samples"
    visualizer.thread.reset().result(20)


def test_an_empty_page_says_what_its_viewer_can_do(launching: Callable[..., Visualizer], pages: Any) -> None:
    visualizer = launching(classroom=True)
    viewer = pages.open(visualizer)
    viewer.locator("[data-testid=empty]").filter(has_text="presenter").wait_for()
    assert "Pick a prompt" not in viewer.inner_text("[data-testid=minipaged]")
    assert "pick a prompt" not in viewer.text_content("[data-testid=narration]")
    presenter = pages.open(visualizer, f"/?presenter={visualizer.presenter}")
    presenter.locator("[data-testid=empty]").filter(has_text="Pick a prompt").wait_for()


# --- sizes ------------------------------------------------------------------------------------------------------


def test_the_running_scene_fits_without_scrolling(serve: Callable[..., Visualizer], pages: Any) -> None:
    """The opening scenario's eleven sequences and one more, all running or waiting."""
    visualizer = serve()
    page = pages.open(visualizer)
    visualizer.thread.pause().result(20)
    submit(visualizer, [*OPENING.arrivals, STORIES[0]])
    steps(visualizer, 100)
    caught_up(page, visualizer)
    assert page.locator("[data-testid=sequence]:not([data-state=finished])").count() == 12
    assert page.evaluate("minipaged.player.records.some((r) => r.marks.includes('preempted'))")
    for width, height in ((1280, 720), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        drawn(page)
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert size == [width, height]
        for part in ("rows", "pool"):
            hidden = page.evaluate(
                """(part) => { let node = document.querySelector(`[data-testid=${part}]`);
                    if (part === "pool") node = node.parentElement;
                    return node.scrollHeight - node.clientHeight; }""",
                part,
            )
            assert hidden == 0, f"{part} would have to be scrolled at {width} × {height}"
        boxes = page.eval_on_selector_all(
            "[data-testid=sequence]",
            """rows => rows.map((row) => [".mp-line", ".mp-table"].map((part) => {
                const box = row.querySelector(part).getBoundingClientRect();
                return [box.top, box.bottom];
            }))""",
        )
        edges = [edge for line, table in boxes for edge in (*line, *table)]
        assert all(a <= b + 0.5 for a, b in zip(edges, edges[1:], strict=False)), "rows overlap"


def test_a_phone_shows_the_scene_and_reaches_everything(paused: tuple[Visualizer, Any]) -> None:
    visualizer, page = paused
    page.set_viewport_size({"width": 390, "height": 844})
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = {
        name: page.locator(f"[data-testid={name}]").first.bounding_box()
        for name in ("prompt", "generate", "scenario", "engine-pause", "narration", "pool", "sequence",
                     "scrub", "view-freeze", "view-back", "view-forward", "event-back", "event-forward", "view-live")
    }  # fmt: skip
    for name, b in box.items():
        assert b["x"] >= 0 and b["x"] + b["width"] <= 390 and b["y"] + b["height"] <= 844, f"{name} is cut off"
    tops = [box[name]["y"] for name in ("prompt", "scenario", "engine-pause", "narration", "pool", "sequence", "scrub")]
    assert tops == sorted(tops), "order: prompt, scenario, scene, view controls"
    for name in ("engine-pause", "view-freeze", "view-back", "view-forward", "generate", "scenario"):
        assert box[name]["height"] >= 36, f"{name} is too small for touch"
    text = page.locator("[data-testid=narration] > span").bounding_box()
    assert text["width"] > 200, "the narration must not wrap at every word"
    assert page.locator("[data-testid=n]").is_hidden()
    page.focus("[data-testid=prompt]")
    assert page.locator("[data-testid=n]").is_visible(), "a focused prompt shows its parameters"

    page.click("[data-testid=sequence][data-seq='6'] .mp-badge")
    sheet = page.locator("[data-testid=drawer]")
    sheet.wait_for()
    sheet.evaluate("sheet => Promise.all(sheet.getAnimations().map((slide) => slide.finished))")  # until it has slid in
    edges = sheet.bounding_box()
    assert edges["x"] == 0 and edges["width"] == 390 and edges["height"] <= 844 * 0.55
    bar = page.locator(".mp-view").bounding_box()
    assert edges["y"] + edges["height"] <= bar["y"] + 1, "the view controls must stay visible"
    page.click("[data-testid=view-back]")
    assert page.evaluate("minipaged.player.position") == visualizer.log.end - 1 and sheet.is_visible()
    page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
    charts = page.locator("[data-testid=charts]").bounding_box()
    assert charts["y"] + charts["height"] <= edges["y"] + 1, "scrolling must uncover the charts"
    page.click("[data-testid=close]")
    sheet.wait_for(state="hidden")
    assert json.dumps(page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")) == "[390, 390]"
