"""Makes the recordings shipped with minipaged, which the page can show without an engine.

    python -m visualizer.make_recordings

They are real runs of the embedded model, small enough to read in an editor. The tests replay them in both reducers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipaged import LLM, SamplingParams
from minipaged.events import Recorder
from visualizer.recordings import FOLDER
from visualizer.scenarios import Arrival

LIMIT = 300_000  # bytes of a recording
SMALL: dict[str, Any] = {"block_size": 16, "max_num_seqs": 10, "max_num_batched_tokens": 64}
TOWN = "In a small town by the sea, there lived a girl named Anna. She had a red boat and a little dog. So"
CROWD = (
    Arrival(0, "Once upon a time", max_tokens=70, seed=1),
    Arrival(6, TOWN, n=4, max_tokens=60, temperature=1.0, seed=2),
    Arrival(14, "The robot opened the door and", max_tokens=60, seed=3),
    Arrival(20, "What is a block table?", max_tokens=40, seed=4, chat=True),
    Arrival(26, TOWN, max_tokens=50, seed=5),  # the second request's prompt: a prefix cache hit
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    record("1-fork-and-preempt", CROWD, num_blocks=26)
    record("2-swap-to-the-cpu", CROWD, num_blocks=26, preemption="swap", swap_blocks=24)
    beams = SamplingParams(temperature=0, beam_width=4, n=2, max_tokens=40)
    record("3-beam-search", (Arrival(0, TOWN),), beams, num_blocks=24)


def record(name: str, arrivals: tuple[Arrival, ...], params: SamplingParams | None = None, **settings: Any) -> None:
    """Runs the arrivals on a new engine, and writes all events to ``name``.jsonl in the recordings folder."""
    llm = LLM("tiny", **(SMALL | settings))
    path = FOLDER / f"{name}.jsonl"
    recorder = Recorder(path)
    recorder(llm.engine.started_event())
    llm.engine.events.subscribe(recorder)
    due, step = list(arrivals), 0
    while due or llm.engine.has_unfinished():
        while due and due[0].at_step <= step:
            submit(llm, due.pop(0), params)
        llm.engine.step()
        llm.engine.check()
        step += 1
    recorder.close()
    size = path.stat().st_size
    print(f"{path.name}: {step} steps, {size // 1000} kB")
    if size >= LIMIT:
        raise SystemExit(f"{path.name} has {size // 1000} kB; the limit is {LIMIT // 1000} kB: shorten its arrivals")


def submit(llm: LLM, arrival: Arrival, params: SamplingParams | None) -> None:
    chat = [{"role": "user", "content": arrival.prompt}]
    tokens = llm.render_chat(chat) if arrival.chat else llm.encode(arrival.prompt)
    sampling = SamplingParams(
        n=arrival.n, temperature=arrival.temperature, max_tokens=arrival.max_tokens, seed=arrival.seed
    )
    llm.engine.add_request(f"request-{llm.engine.scheduler.step}", tokens, replace(params or sampling))


if __name__ == "__main__":
    main()
