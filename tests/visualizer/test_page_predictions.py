"""The page shows each cached block's prediction, and the reason of each eviction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipaged import SamplingParams
from minipaged.events import Event, Recorder, State, load_recording, replay
from tests.fake import fake_engine
from tests.visualizer.test_page import as_json
from tests.visualizer.test_page_scene import seek
from visualizer.app import Visualizer


def recording(path: Path) -> list[Event]:
    """Records prompts of several kinds; the predictor predicts a last turn for every second one."""
    engine, recorder = fake_engine(num_blocks=12, eviction="flush-when-all-0"), Recorder(path)
    closing = iter([False, True] * 8)
    engine.memory.prefix_cache.policy.predict = lambda tokens: next(closing)
    recorder(engine.started_event())
    engine.events.subscribe(recorder)
    for number in range(6):
        engine.add_request(f"r{number}", [number] * 10, SamplingParams(max_tokens=6, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
    recorder.close()
    return load_recording(path)


def test_bits_are_on_the_blocks_and_reasons_in_the_narration(
    launching: Callable[..., Visualizer], pages: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    events = recording(path)
    *_, final = replay(events)
    assert set(final.predicted.values()) == {False, True}
    page = pages.open(launching(replay=path))
    seek(page, page.evaluate("minipaged.player.end"))
    dumped = page.evaluate("minipaged.dump()")
    assert dumped["predicted"] == {str(block): bit for block, bit in final.predicted.items()}
    assert State.from_dict(dumped) == State.from_dict(as_json(final))
    for bit in (0, 1):
        marked = page.eval_on_selector_all(f".mp-cell[data-bit='{bit}']", "c => c.map(x => Number(x.dataset.block))")
        assert marked == sorted(block for block, said in final.predicted.items() if said == bit)
    assert page.is_visible(".mp-if-predicted")
    told = page.evaluate("minipaged.player.records.map((r) => (r.told?.type === 'evicted' ? r.told.text : null))")
    at = next(number for number, text in enumerate(told, start=1) if text)
    assert any(event.reason in told[at - 1] for event in events if event.type == "evicted")
    seek(page, at)
    assert "Why this one" in page.text_content("[data-testid=narration]")
