"""LLM: the main entry point. Loads a model, sizes its KV cache, and drives the engine for you."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import count
from os import PathLike
from typing import Any

from minipaged.build import BatchItem, build_engine, load
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.engine import Engine
from minipaged.errors import (
    InvalidConfig,
    InvalidRequest,
    RequestFailed,
    StepFailed,
    same_process,
    unicode_text,
)
from minipaged.models.loader import LoadedModel, load_model
from minipaged.models.sampling_defaults import stated
from minipaged.outputs import CompletionOutput, Delta, RequestOutput, differences
from minipaged.text.prompts import as_prompts, read_prompt

Prompt = str | list[int] | Mapping[str, Any]
Messages = list[dict[str, Any]]  # contents are strings, or lists of OpenAI's text parts

_BUILT_IN: dict[str, int] = {}  # the process that built the first LLM; a forked one inherits it


class LLM:
    """A model and an engine that serves it. Threads may share it: their requests are batched together.

    Takes the fields of `EngineConfig` as keywords. Raises `InvalidConfig` or `ModelError`, if possible before it loads
    any weights. In a process forked from this one it raises `UsedAfterFork`. ``shard`` is for
    `features.tensor_parallel.launch.run`, which runs one LLM on several processes.

    ``default_params`` are the sampling parameters of requests that bring none: `SamplingParams`' defaults, updated with
    what the model's ``generation_config.json`` states. Assign to it to change them.

    >>> llm = LLM("tiny")
    >>> print(llm.generate("Once upon a time", SamplingParams(seed=1))[0].outputs[0].text)
    """

    def __init__(self, model: str | PathLike[str] = "tiny", *, shard: Any = None, **settings: Any) -> None:
        _refuse_a_forked_process()
        try:
            config = EngineConfig(model=model, **settings)  # type: ignore[arg-type]  # it takes a Path, too
        except TypeError as error:
            raise InvalidConfig(f"{error}; see EngineConfig for the settings") from None
        loaded = load(config, shard)
        _BUILT_IN.setdefault("pid", os.getpid())
        self.tokenizer = loaded.tokenizer
        self.generation_config = loaded.generation_config
        self.default_params = SamplingParams(**stated(loaded.generation_config))
        self._loaded, self._drafts = loaded, dict[str, LoadedModel]()
        self.engine = build_engine(config, loaded, self._draft(config))
        self._ids = count()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._in_engine = False
        self._dropped: list[str] = []  # streams that the garbage collector closed during a step
        self._inboxes: dict[str, deque[RequestOutput]] = {}

    def build_engine(self, config: EngineConfig) -> Engine:
        """Builds another engine on the same weights, with its own KV cache. ``self.engine`` does not change.

        ``config`` may differ in everything except model, device and dtype. Raises `InvalidConfig`.
        """
        same_process(self._pid, "LLM")
        if self._loaded.shard is not None:
            raise InvalidConfig("with tensor parallelism an LLM has only one engine; launch another LLM instead")
        parts = {"make_memory": self.engine.make_memory, "make_scheduler": self.engine.make_scheduler}
        return build_engine(config, self._loaded, self._draft(config), **parts)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        schedule: str = "fcfs",
    ) -> list[RequestOutput]:
        """Completes one prompt or many, batched together; results come in the order of the prompts.

        A prompt is text, a list of token ids, or vLLM's ``{"prompt": …}`` or ``{"prompt_token_ids": …}``. ``params`` is
        one for all prompts, or a list with one for each; without them ``default_params`` apply. On a terminal, long
        runs show a progress bar. ``schedule``: ``"fcfs"`` starts the prompts in their order; ``"batchllm"`` groups
        prompts that share a prefix and computes each shared prefix once. The outputs are the same, up to rounding.
        Raises `InvalidRequest` if any prompt cannot be served (then none is), `InvalidConfig` if the engine does not
        support the schedule, `StepFailed` if a step fails, `RequestFailed` if a request fails alone: the others are
        computed to their end, and the exception's ``outputs`` has them all.
        """
        self.engine.config.check_schedule(schedule)
        prompt_list = as_prompts(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.default_params] * len(prompt_list)
        if not isinstance(params, (list, tuple)):
            raise InvalidRequest(f"params must be a SamplingParams or a list of them, not {type(params).__name__}")
        if len(params) != len(prompt_list):
            raise InvalidRequest(f"{len(prompt_list)} prompts, but {len(params)} sampling parameters; give one or all")
        ids: list[str] = []
        try:
            if schedule == "batchllm":
                ids = self._submit_batch(prompt_list, params)
            else:
                for prompt, one in zip(prompt_list, params, strict=True):
                    ids.append(self._submit(prompt, one))
            return self._finish(ids)
        finally:
            for request_id in ids:
                self._close(request_id)

    def chat(self, messages: Messages, params: SamplingParams | None = None, **template: Any) -> RequestOutput:
        """Answers a conversation: dicts with ``role`` ("system", "user" or "assistant") and ``content``.

        ``template`` takes `text.render_chat`'s keywords: ``continue_final_message=True`` goes on with the last message,
        the beginning of an answer; ``chat_template_kwargs`` are variables of the model's chat template.
        """
        return self.generate([self.render_chat(messages, **template)], params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Completes one prompt and yields what each step adds, for each of its n sequences.

        Closing the iterator early aborts the request and frees its blocks. Raises `InvalidRequest` for a beam search,
        which has no text before it ends.
        """
        deltas = self._deltas(self._submit_stream(prompt, params))
        next(deltas)  # enters its try block: a generator that never ran would not clean up when dropped
        return deltas

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Delta]:
        """`stream` for asyncio. Steps run in a thread, beside the event loop; concurrent streams are batched."""
        submission = asyncio.ensure_future(asyncio.to_thread(self._submit_stream, prompt, params))
        try:
            request_id = await asyncio.shield(submission)
        except asyncio.CancelledError:
            # The thread cannot be cancelled, so the request is closed once the thread has submitted it.
            submission.add_done_callback(lambda done: None if done.exception() else self._close(done.result()))
            raise
        inbox = self._inboxes[request_id]
        seen: dict[int, CompletionOutput] = {}
        try:
            finished = False
            while not finished:
                output = await asyncio.to_thread(self._next, request_id, inbox)
                finished = output.finished
                for delta in differences(output, seen):
                    yield delta
                _raise_error(output)
        finally:
            self._close(request_id)

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None, **template: Any) -> Iterator[Delta]:
        """`stream` for a conversation, with the keywords of `chat`."""
        return self.stream(self.render_chat(messages, **template), params)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the beginning-of-text token if the model's tokenizer adds one."""
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; give token ids instead of text")
        if not isinstance(text, str):
            raise InvalidRequest(f"a text must be a string, not {type(text).__name__}")
        unicode_text(text, "the text")
        return list(self.tokenizer(text)["input_ids"])

    def render_chat(
        self,
        messages: Messages,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, formatted by the model's chat template and ready for the assistant's answer.

        The keywords are those of `text.render_chat`.
        """
        from minipaged.text import render_chat  # transformers is slow to import; only chats need it

        return render_chat(
            self.tokenizer,
            messages,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )

    # --- driving the engine -----------------------------------------------------------------------------------
    # A thread that waits for output runs engine steps, which serve all threads' requests; a lock lets them take turns.

    def _draft(self, config: EngineConfig) -> LoadedModel | None:
        """The draft model that ``config`` names, loaded once. Raises `InvalidConfig` if it does not fit the model."""
        if config.speculate is None or not config.drafts_with_model:
            return None
        if config.speculate not in self._drafts:
            self._drafts[config.speculate] = load_model(config.speculate, config.device, config.dtype)
        draft, spec, own = self._drafts[config.speculate], self._drafts[config.speculate].spec, self._loaded.spec
        vocabularies = [model.tokenizer.get_vocab() for model in (draft, self._loaded) if model.tokenizer is not None]
        if spec.vocab_size != own.vocab_size or (len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]):
            sizes = f"{spec.vocab_size} tokens and {own.vocab_size}"
            raise InvalidConfig(
                f"a draft model must have the same vocabulary as the model, but those of {config.speculate} and "
                f"{config.model} differ ({sizes}); choose a smaller model of the same family"
            )
        if spec.max_model_len < (config.max_model_len or own.max_model_len):
            raise InvalidConfig(
                f"the draft model {config.speculate} supports at most {spec.max_model_len} tokens; "
                "set max_model_len to that or less"
            )
        return draft

    def _submit(self, prompt: Prompt, params: SamplingParams) -> str:
        tokens, text = self._read(prompt)
        with self._engine_alone():
            request_id = f"llm-{next(self._ids)}"
            self.engine.add_request(request_id, tokens, params, prompt=text)
            self._inboxes[request_id] = deque(maxlen=1)  # the newest output contains all earlier ones
        return request_id

    def _submit_batch(self, prompts: list[Prompt], params: Seq[SamplingParams]) -> list[str]:
        """Adds all prompts to the engine as one batch, or none if one of them is invalid."""
        batch = [
            BatchItem(f"llm-{next(self._ids)}", tokens, one, text)
            for (tokens, text), one in zip(map(self._read, prompts), params, strict=True)
        ]
        with self._engine_alone():
            self.engine.add_batch(batch)
            self._inboxes |= {item.request_id: deque(maxlen=1) for item in batch}
        return [item.request_id for item in batch]

    def _read(self, prompt: Prompt) -> tuple[list[int], str | None]:
        """A prompt's token ids, and its text if it has one."""
        text, tokens = read_prompt(prompt)
        return self.encode(text or "") if tokens is None else tokens, text

    def _submit_stream(self, prompt: Prompt, params: SamplingParams | None) -> str:
        params = self.default_params if params is None else params
        if isinstance(params, SamplingParams):
            if params.beam_width:
                raise InvalidRequest("a beam search has no text before it ends and cannot be streamed; use generate")
            if params.prompt_logprobs is not None:
                raise InvalidRequest("a stream does not return prompt_logprobs; use generate")
        return self._submit(prompt, params)

    @contextmanager
    def _engine_alone(self) -> Iterator[None]:
        """Gives exclusive access to the engine, also against a generator's finalizer in the same thread."""
        same_process(self._pid, "LLM")
        with self._lock:
            self._in_engine = True
            try:
                yield
            finally:
                self._in_engine = False
                while self._dropped:
                    self._close(self._dropped.pop())

    def _close(self, request_id: str) -> None:
        """Aborts the request, if it has not finished, and wakes a thread that still waits for it."""
        if os.getpid() != self._pid:  # a forked process drops its copy of a stream
            return
        with self._lock:
            if self._in_engine:  # the garbage collector closed a stream while this thread was inside the engine
                self._dropped.append(request_id)
                return
            inbox, output = self._inboxes.pop(request_id), self.engine.abort(request_id)
            if output is not None:
                inbox.append(output)

    def _step(self, inboxes: dict[str, deque[RequestOutput]]) -> None:
        """Runs one engine step, unless another thread's step has just delivered output to one of these inboxes.

        Outputs of failed requests have an ``error``, which the callers that wait for them raise.
        """
        with self._engine_alone():
            if any(inboxes.values()):
                return
            for request_id in inboxes:
                if not self.engine.is_unfinished(request_id):
                    raise RuntimeError(f"{request_id} was ended through llm.engine, whose caller got its output")
            try:
                outputs = self.engine.step()
            except StepFailed as error:
                outputs = error.outputs
            except BaseException as error:  # Ctrl-C and its kind
                self._deliver(getattr(error, "outputs", []))
                raise
            self._deliver(outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)

    def _next(self, request_id: str, inbox: deque[RequestOutput]) -> RequestOutput:
        while not inbox:
            self._step({request_id: inbox})
        return inbox.popleft()

    def _finish(self, ids: list[str]) -> list[RequestOutput]:
        """Steps the engine until all these requests are finished; returns their last outputs in order.

        Raises `StepFailed` at once, `RequestFailed` when all are finished.
        """
        open_: dict[str, deque[RequestOutput]] = {request_id: self._inboxes[request_id] for request_id in ids}
        last: dict[str, RequestOutput] = {}
        with _Progress(len(ids)) as progress:
            while open_:
                self._step(open_)
                for request_id, inbox in list(open_.items()):
                    if inbox:
                        last[request_id] = inbox.popleft()
                        if isinstance(last[request_id].error, StepFailed):
                            _raise_error(last[request_id])
                        if last[request_id].finished:
                            del open_[request_id]
                progress.update(last)
        outputs = [last[i] for i in ids]
        failed = [number for number, output in enumerate(outputs) if output.error is not None]
        if failed:
            error = outputs[failed[0]].error
            which = f"prompt {failed[0]} of {len(ids)} ({len(failed)} failed): " if len(ids) > 1 else ""
            raise RequestFailed(f"{which}{error}", outputs) from error
        return outputs

    def _deltas(self, request_id: str) -> Iterator[Delta]:
        inbox = self._inboxes[request_id]
        seen: dict[int, CompletionOutput] = {}
        try:
            yield Delta(0, "", [], None)  # swallowed by `stream`
            finished = False
            while not finished:
                output = self._next(request_id, inbox)
                finished = output.finished
                yield from differences(output, seen)
                _raise_error(output)
        finally:
            self._close(request_id)


def _refuse_a_forked_process() -> None:
    """Raises `UsedAfterFork` if an LLM was built in a process that this one was forked from: torch's threads computed
    there, do not exist here, and would be waited for.
    """
    same_process(_BUILT_IN.get("pid", os.getpid()), "program's first LLM")


def _raise_error(output: RequestOutput) -> None:
    """Raises what ended the request, if it failed; a new exception each time, since several threads may raise it."""
    error = output.error
    if isinstance(error, RequestFailed):
        raise type(error)(str(error), error.outputs or [output]) from error


class _Progress:
    """A progress bar on stderr. It appears after two seconds, and only on a terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, outputs: dict[str, RequestOutput]) -> None:
        if self._bar is None and (time.monotonic() - self._started < 2 or not sys.stderr.isatty()):
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc="requests", unit="req", leave=False)
        done = sum(output.finished for output in outputs.values())
        tokens = sum(len(out.token_ids) for output in outputs.values() for out in output.outputs)
        self._bar.set_postfix_str(f"{tokens} tokens", refresh=False)
        self._bar.update(done - self._bar.n)
