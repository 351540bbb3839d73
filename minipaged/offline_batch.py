"""Offline batch inference: answers a file of requests in OpenAI's batch format, without a server.

A line of the input is ``{"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}``, a line of
the output ``{"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …, "body": {…}}, "error": null}``.
Answers are appended as they finish, in no fixed order. So a run that was killed can be resumed: requests that the
output already answers are skipped, and an incomplete line at its end is cut off.
"""

from __future__ import annotations

import json
import os
import uuid
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from os.path import commonprefix
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from minipaged.build import BatchItem
from minipaged.errors import InvalidRequest, StepFailed
from minipaged.outputs import RequestOutput
from minipaged.server.answers import Answer, model_name, prepare, refusal
from minipaged.server.protocol import ApiError, ChatRequest, CompletionRequest, parse, why_no_json

KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
ANSWER = 1000  # work per answer, in prompt characters: an estimate, only the sizes of the parts depend on it


@dataclass(frozen=True)
class Task:
    """One request of the batch: a line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def beginning(self) -> str:
        """The prompt as a sort key: it puts requests that share a prefix next to each other."""
        return json.dumps(self.body.get("messages", self.body.get("prompt")), ensure_ascii=False)


@dataclass
class _Open:
    """A task in the engine: one request for each of its prompts."""

    task: Task
    answer: Answer
    outputs: dict[str, RequestOutput | None]  # by request id, in the order of the prompts


def open_batch(path: Path, out: Path) -> list[Task]:
    """The tasks of the file at ``path`` that ``out`` does not answer yet, sorted so that shared prefixes are adjacent.

    Cuts an incomplete line off the end of ``out``. Raises `InvalidRequest`, naming the line, for a file that is not a
    batch, before it computes anything.
    """
    tasks = _read(path)
    done = _repair(out)
    if strangers := done - set(tasks):
        raise InvalidRequest(f"{out} answers {min(strangers)!r}, which is not in {path}; give another --out")
    return sorted((task for key, task in tasks.items() if key not in done), key=lambda task: task.beginning)


def partition(tasks: list[Task], parts: int) -> list[list[Task]]:
    """Splits tasks into at most ``parts`` contiguous, non-empty parts of about equal work, one for each worker.

    Workers share no prefix cache, so a cut should not separate a shared prefix. ``tasks`` are sorted, as `open_batch`
    returns them; each cut lies within a quarter of a share of the even split, where the shared prefix is shortest.
    """
    starts = [0, *accumulate(len(task.beginning) + ANSWER for task in tasks)]  # the work before each task
    share = starts[-1] / parts
    cuts = [0]
    for even in (share * part for part in range(1, parts)):
        near = range(bisect_left(starts, even - share / 4), bisect_right(starts, even + share / 4))
        # A long task may cover this whole range: then the cut comes after it.
        places = [at for at in near or (bisect_left(starts, even),) if cuts[-1] < at < len(tasks)]
        if places:
            cuts.append(min(places, key=lambda at: (_common(tasks[at - 1], tasks[at]), abs(starts[at] - even))))
    return [tasks[a:b] for a, b in pairwise([*cuts, len(tasks)]) if a < b]


def _common(one: Task, other: Task) -> int:
    """The length in characters of the two prompts' common prefix."""
    return len(commonprefix([one.beginning, other.beginning]))


def run(
    llm: Any,
    tasks: list[Task],
    out: Path,
    progress: Callable[[int], None] = lambda done: None,
    schedule: str = "fcfs",
) -> None:
    """Answers the tasks, batched by the engine, and appends the answers to ``out``.

    Calls ``progress`` with the number of finished tasks; ``schedule`` is that of `LLM.generate`. Raises
    `InvalidRequest` if another process writes to ``out``, `InvalidConfig` if the engine does not support the schedule.
    """
    llm.engine.config.check_schedule(schedule)
    write(answers(llm, tasks, schedule), out, progress)


def write(answers: Iterable[list[bytes]], out: Path, progress: Callable[[int], None]) -> None:
    """Appends the answers to ``out``, once it holds a lock on it; nothing is computed before. Raises as `run`."""
    done = 0
    with open(out, "ab") as file:
        _lock(file, out)
        for lines in answers:
            _append(file, lines)
            done += len(lines)
            progress(done)


def answers(llm: Any, tasks: list[Task], schedule: str = "fcfs") -> Iterator[list[bytes]]:
    """Yields lines of the output as tasks finish: after each step those of the tasks that it finished."""
    engine, model = llm.engine, model_name(llm.engine.config.model)
    todo = deque(tasks)
    running: dict[str, _Open] = {}
    at_once = inf if schedule == "batchllm" else 2 * engine.config.max_num_seqs
    while todo or running:
        lines = []
        batch: list[BatchItem] = []
        while todo and len(running) < at_once:
            task = todo.popleft()
            try:
                open_, items = _prepare(llm, model, task)
            except ApiError as error:
                lines.append(_line(task, error.status, error.body()))
            else:
                running |= dict.fromkeys(open_.outputs, open_)
                batch += items
        _submit(engine, batch, schedule)
        lines += _step(engine, running)
        if lines:
            yield lines


def _prepare(llm: Any, model: str, task: Task) -> tuple[_Open, list[BatchItem]]:
    """Converts a task into requests for the engine. Raises `ApiError` for a task that the engine would refuse."""
    request = parse(KINDS[task.url], task.body)
    if request.stream:
        raise ApiError(400, "a batch cannot be streamed", param="stream")
    try:
        answer, prompts, params = prepare(llm, model, request)
        items = [BatchItem(f"batch-{uuid.uuid4().hex}", prompt, params) for prompt in prompts]
        for item in items:
            llm.engine.check_request(*item[:3])
    except InvalidRequest as error:
        raise refusal(error) from None
    return _Open(task, answer, dict.fromkeys(item.request_id for item in items)), items


def _submit(engine: Any, batch: list[BatchItem], schedule: str) -> None:
    if schedule == "batchllm":
        if batch:
            engine.add_batch(batch)
        return
    for item in batch:
        engine.add_request(*item[:3])


def _step(engine: Any, running: dict[str, _Open]) -> list[bytes]:
    """Runs one step and returns the lines of the tasks that it finished. A failed step ends the tasks it computed."""
    try:
        outputs = engine.step()
    except StepFailed as error:
        outputs = error.outputs
    lines = []
    for output in outputs:
        if not output.finished or output.request_id not in running:
            continue
        open_ = running[output.request_id]
        open_.outputs[output.request_id] = output
        failed = output.error is not None or any(out.finish_reason == "abort" for out in output.outputs)
        if not failed and None in open_.outputs.values():
            continue
        for request_id in open_.outputs:
            engine.abort(request_id)  # does something only if the task failed: the requests of its other prompts
            running.pop(request_id, None)
        if failed:
            alone = output.error is not None and not isinstance(output.error, StepFailed)
            why = str(output.error) if alone else "a step of the engine failed"
            lines.append(_line(open_.task, 500, ApiError(500, why).body()))
        else:
            lines.append(_line(open_.task, 200, open_.answer.whole([o for o in open_.outputs.values() if o])))
    return lines


def _line(task: Task, status: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": f"req-{uuid.uuid4().hex}", "body": body}
    line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": task.custom_id, "response": response, "error": None}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _append(file: BinaryIO, lines: list[bytes]) -> None:
    file.write(b"".join(lines))
    file.flush()
    os.fsync(file.fileno())  # answers that are reported as done survive a crash


def _lock(file: BinaryIO, out: Path) -> None:
    """Locks the file for this process, on systems that have file locks. Raises `InvalidRequest` if it is locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InvalidRequest(f"another process is writing to {out}; wait for it, or give another --out") from None


def _read(path: Path) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    try:
        if path.is_char_device():
            raise InvalidRequest(f"{path} is a device; give a file of requests")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    task = _task(line, f"{path}, line {number}")
                    if task.custom_id in tasks:
                        raise InvalidRequest(f"{path}, line {number}: custom_id {task.custom_id!r} is used twice")
                    tasks[task.custom_id] = task
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    return tasks


def _task(line: bytes, where: str) -> Task:
    try:
        data = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"{where}: {why_no_json(error)}") from None
    if not isinstance(data, dict) or not isinstance(data.get("body"), dict):
        raise InvalidRequest(f"{where}: a request is an object with custom_id, method, url and body")
    custom_id, url = data.get("custom_id"), data.get("url")
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidRequest(f"{where}: custom_id must be a non-empty string")
    if data.get("method") != "POST" or url not in KINDS:
        raise InvalidRequest(f"{where}: method must be POST and url one of {', '.join(KINDS)}")
    if unknown := set(data) - {"custom_id", "method", "url", "body"}:
        raise InvalidRequest(f"{where}: unknown keys: {', '.join(sorted(unknown))}")
    return Task(custom_id, url, data["body"])


def _repair(out: Path) -> set[str]:
    """The ids of the tasks that ``out`` answers. Truncates an incomplete last line, left by a killed run."""
    if not out.exists():
        return set()
    if not out.is_file():
        raise InvalidRequest(f"{out} is no file, and --out must be one: a run that is interrupted resumes from it")
    with open(out, "r+b") as file:
        _lock(file, out)
        whole = 0
        done = set()
        for number, line in enumerate(_whole_lines(file), start=1):
            try:
                done.add(json.loads(line)["custom_id"])
            except (ValueError, TypeError, KeyError):
                raise InvalidRequest(f"{out}, line {number}: not an answer of a batch; give another --out") from None
            whole += len(line)
        file.truncate(whole)
    return done


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    return (line for line in file if line.endswith(b"\n"))
