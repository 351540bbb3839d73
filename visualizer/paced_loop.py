"""The engine's loop for the page: it steps at a limited rate, and adds pause, scenarios and questions."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

from minipaged.build import rebuild
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.engine_thread import EngineLoop
from minipaged.errors import InvalidConfig, InvalidRequest
from minipaged.events import EngineError, EngineStarted, Event
from minipaged.features.batchllm.groups import BatchItem
from minipaged.models.sampling_defaults import CHAT_TEMPERATURE, FIELDS, stated
from visualizer.questions import Question, Quiz
from visualizer.scenarios import Arrival, Scenario

MAX_WAITING = 50  # requests; with more, repeated clicks would only lengthen the queue for all viewers
TIME_TO_ANSWER = 20.0  # seconds a step is held back for a viewer's prediction before it is shown
MAX_BLOCKS = 4096  # in a pool that a viewer asks for: the page draws every block
DEFAULT_RATE = 12.0  # steps per second: fast enough to feel alive, slow enough to follow

log = logging.getLogger(__name__)


class Sink(Protocol):
    """The receiver of events and status. Its methods are called in the engine's thread and must not block."""

    def started(self, event: EngineStarted) -> None:
        """A new run begins, with an empty pool and no requests."""

    def publish(self, events: list[Event]) -> None:
        """The events of one step, or those between two steps (a request was added or aborted)."""

    def status(self, status: dict[str, Any]) -> None:
        """The loop's status: paused, rate, whether there is work, the scenario and its question."""


class PacedLoop(EngineLoop):
    """Steps ``llm.engine`` at a given rate while there is work, and publishes its events to a sink.

    All public methods may be called from any thread; they return a `Future` of the command's result.
    """

    def __init__(self, llm: Any, sink: Sink, rate: float | None = DEFAULT_RATE) -> None:
        super().__init__(llm)
        self._home = self.engine.config  # the configuration that a scenario's settings override
        self._sink = sink
        self._rate = rate
        self._paused = False
        self._pending: list[Event] = []  # emitted, not yet published
        self._script: deque[Arrival] = deque()  # the scenario's arrivals not yet submitted
        self._script_step = 0
        self._num_requests = 0
        self._conversations = count()  # not reset with a run: a chat must not receive another chat's answer
        self._next_step_at = 0.0
        self._scenario: Scenario | None = None
        self._asks = False  # whether this scenario's question is asked
        self._quiz: Quiz | None = None  # set until the question is asked
        self._question: Question | None = None  # the open question; the step that answers it is held back
        self._question_ends = 0.0
        self._question_id = 0
        self._verdict: dict[str, Any] | None = None  # the last question's answer, for all viewers
        self._loading = ""  # the model that is being loaded

    def start(self) -> None:
        """Starts the thread with a rebuilt, empty engine: the viewers have not seen any earlier events."""
        self._adopt(rebuild(self.llm.engine))
        super().start()

    # --- commands -------------------------------------------------------------------------------------------

    def submit(self, arrival: Arrival) -> Future[str]:
        """Queues a request. Raises `InvalidRequest` if it can never be served."""
        return self.call(lambda: self._submit(arrival))

    def fork(self, request_id: str) -> Future[str]:
        """Forks a running request into a second one. Raises `InvalidRequest` if it cannot be forked."""
        return self.call(lambda: self.engine.fork(request_id))

    def pause(self) -> Future[None]:
        return self.call(lambda: self._set_paused(True))

    def resume(self) -> Future[None]:
        return self.call(lambda: self._set_paused(False))

    def step(self) -> Future[None]:
        """Pauses, then computes one step or shows the step that is held back."""

        def step() -> None:
            self._paused = True
            self._advance()

        return self.call(step)

    def set_rate(self, rate: float | None) -> Future[None]:
        """Sets the rate in steps per second; ``None`` means as fast as possible."""

        def set_rate() -> None:
            self._rate = rate
            self._next_step_at = 0.0

        return self.call(set_rate)

    def reset(self, scenario: Scenario | None = None) -> Future[None]:
        """Starts a new run: empty pool, sequence 0, the engine's first seed. Plays ``scenario`` if given, on an engine
        with the scenario's settings."""

        def reset() -> None:
            config = replace(self._home, **scenario.settings) if scenario and scenario.settings else None
            self._adopt(self._engine(config or self.engine.config))
            self._play(scenario)

        return self.call(reset)

    def configure(self, config: EngineConfig, llm: Any = None) -> Future[None]:
        """Starts a new run with ``config``, and with another model if ``llm`` is given. `InvalidConfig`: no change."""

        def configure() -> None:
            engine = llm.engine if llm else self._engine(config)
            if engine.num_blocks > MAX_BLOCKS:
                blocks = f"{engine.num_blocks:,} blocks; this page shows at most {MAX_BLOCKS:,}"
                raise InvalidConfig(f"the pool would have {blocks}: make it smaller")
            self.llm = llm or self.llm
            self._home = engine.config
            self._adopt(engine)
            self._play(None)

        return self.call(configure)

    def set_loading(self, model: str) -> Future[None]:
        """Publishes the name of the model that is being loaded; ``""`` means that loading has ended."""

        def set_loading() -> None:
            self._loading = model

        return self.call(set_loading)

    def set_asking(self, asks: bool) -> Future[None]:
        """Turns the scenario's question on or off. Turning it off reveals the answer to an open question."""

        def set_asking() -> None:
            self._asks = asks
            if not asks:
                self._reveal()

        return self.call(set_asking)

    def answer(self, question_id: int) -> Future[None]:
        """Shows the step that was held back, if the question with this id is still open."""

        def answer() -> None:
            if question_id == self._question_id:
                self._reveal()

        return self.call(answer)

    # --- what differs in the thread -------------------------------------------------------------------------

    def _patience(self) -> float | None:
        """Seconds to wait for a command until the next step is due; ``None`` if no step is due."""
        if self._question is not None:
            return max(0.0, self._question_ends - time.monotonic())
        if self._paused or not self._has_work():
            return None
        return max(0.0, self._next_step_at - time.monotonic())

    def _step(self) -> None:
        """Shows the step that is held back; otherwise submits the scenario's due arrivals and computes one step."""
        if self._question is not None:
            self._reveal()
            return
        now = time.monotonic()
        if self._rate is not None:
            # Counted from when this step was due, so that the rate holds on average; but no burst after a pause.
            self._next_step_at = max(self._next_step_at, now - 0.1) + 1 / self._rate
        self._submit_due()
        super()._step()
        self._script_step += 1
        self._ask()

    def _settle(self) -> None:
        self._flush()
        self._publish_status()

    def _recover(self, error: Exception) -> None:
        """After an error: restarts if a listener waits for answers, else pauses, as every step would raise it again."""
        if self._listener is None:
            self._paused = True
        else:
            super()._recover(error)
        self._pending.append(EngineError(f"{type(error).__name__}: {error}"))

    def _adopt(self, engine: Engine) -> None:
        """Replaces the engine with ``engine``, and begins a new run."""
        super()._adopt(engine)
        self._pending.clear()
        self._question = None
        self._num_requests = 0
        engine.events.subscribe(self._pending.append)
        self._sink.started(engine.started_event())
        self._publish_status()

    # --- the page's own -------------------------------------------------------------------------------------

    def _has_work(self) -> bool:
        return bool(self._script) or self.engine.has_unfinished()

    def _submit_due(self) -> None:
        """Submits the arrivals that are due. An idle engine gets the next one at once: its step count stands still."""
        if self._script and self._scenario is not None and self._scenario.batch:
            self._submit_batch()
        while self._script:
            if self._script[0].at_step > self._script_step and self.engine.has_unfinished():
                break
            arrival = self._script.popleft()
            try:
                self._submit(arrival)
            except InvalidRequest as error:  # the scenario was made for another model
                log.warning("the scenario's prompt %r cannot be served: %s", arrival.prompt, error)

    def _submit(self, arrival: Arrival) -> str:
        if not arrival.prompt.strip():
            raise InvalidRequest("The prompt is empty: write a few words to go on from.")
        if len(self.engine.scheduler.waiting) >= MAX_WAITING:
            raise InvalidRequest(f"{MAX_WAITING} requests are waiting already; try again when some are done.")
        item = self._item(arrival)
        self.engine.add_request(item.request_id, item.prompt_token_ids, item.params, prompt=item.prompt)
        self._num_requests += 1
        self._flush()
        return item.request_id

    def _submit_batch(self) -> None:
        """Submits the whole script as one batch. If the engine rejects it, the arrivals are submitted one by one."""
        batch: list[BatchItem] = []
        for number, arrival in enumerate(self._script):
            batch.append(self._item(arrival)._replace(request_id=f"request-{number}"))
        try:
            self.engine.add_batch(batch)
        except (InvalidRequest, InvalidConfig) as error:  # another model, or a scheduler without groups
            log.warning("the scenario's requests cannot form one batch, so they are submitted one by one: %s", error)
            return
        self._num_requests += len(batch)
        self._script.clear()
        self._flush()

    def _item(self, arrival: Arrival) -> BatchItem:
        conversation = arrival.conversation()
        tokens = self.llm.render_chat(conversation) if conversation else self.llm.encode(arrival.prompt)
        chat = f"chat-{next(self._conversations)}" if arrival.messages else None
        return BatchItem(chat or f"request-{self._num_requests}", tokens, arrival.params(), arrival.prompt)

    def _play(self, scenario: Scenario | None) -> None:
        self._script = deque(scenario.arrivals if scenario else ())
        self._script_step = 0
        self._paused = False
        self._scenario = scenario
        self._asks = scenario is not None and scenario.asks
        self._verdict = None
        named = scenario.question if scenario else None
        self._quiz = Quiz(named, self.engine.started_event()) if named else None

    def _ask(self) -> None:
        """Holds back the step just computed if it answers the scenario's question."""
        if self._quiz is None or not self._asks:
            return
        question = self._quiz.question(self._pending)
        if question is not None:
            self._question, self._quiz, self._verdict = question, None, None
            self._question_id += 1
            self._question_ends = time.monotonic() + TIME_TO_ANSWER

    def _reveal(self) -> None:
        question, self._question = self._question, None
        if question is not None:
            self._verdict = {"id": self._question_id, "answer": question.answer, "why": question.why}

    def _set_paused(self, paused: bool) -> None:
        self._reveal()
        self._paused = paused
        self._next_step_at = 0.0

    def _engine(self, config: EngineConfig) -> Engine:
        """A new engine with ``config``. It reuses the KV tensors if the configuration is unchanged."""
        return rebuild(self.engine) if config == self.engine.config else self.llm.build_engine(config)

    def _flush(self) -> None:
        if self._question is not None:
            return  # these events come after the question, so they are published when it is answered
        events = list(self._pending)
        if self._quiz is not None:
            self._quiz.saw(events)
        self._pending.clear()
        if events:
            try:
                self._sink.publish(events)
            except Exception:  # an error in the sink must not stop the engine
                log.exception("could not publish %s", events[0].type)

    def _publish_status(self) -> None:
        scenario, question = self._scenario, self._question
        self._sink.status(
            {
                "paused": self._paused,
                "rate": self._rate,
                "busy": self._has_work(),
                "loading": self._loading,
                "scenario": scenario.key if scenario else None,
                "asks": self._asks,
                "question": question
                and {
                    "id": self._question_id,
                    "text": question.text,
                    "choices": question.choices,
                    "seconds": TIME_TO_ANSWER,
                },
                "verdict": self._verdict,
                "sampling": own_sampling(self.llm),
            }
        )


def own_sampling(llm: Any) -> dict[str, float]:
    """The sampling parameters that apply where the viewer gives none: the model's own, if it states any."""
    own = {name: getattr(llm.default_params, name) for name in FIELDS}
    unstated = not stated(llm.generation_config) and own["temperature"] == SamplingParams.temperature
    return own | {"temperature": CHAT_TEMPERATURE} if unstated else own
