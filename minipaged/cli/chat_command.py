"""``minipaged chat``: a conversation in the terminal, with the embedded engine or any OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from minipaged.cli.options import (
    DEFAULT,
    Attention,
    Device,
    Dtype,
    KvDtype,
    KvMemory,
    MaxModelLen,
    MaxNumSeqs,
    MaxTokens,
    Memory,
    MinP,
    Model,
    NumBlocks,
    NumSpeculativeTokens,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    fail,
    given,
    load,
    own_sampling,
    pool,
    sampling,
)  # fmt: skip
from minipaged.config import SamplingParams
from minipaged.errors import InvalidRequest, MinipagedError
from minipaged.models.sampling_defaults import CHAT_TEMPERATURE

HELP = """\
/system TEXT  set the system prompt; without TEXT, show it
/save FILE    write the conversation as JSON
/load FILE    continue a saved conversation
/reset        forget the conversation
/exit         leave (or Ctrl-C or Ctrl-D at the prompt; during an answer, Ctrl-C stops the answer only)
/help         this list
A line that ends with \\ continues on the next; \"\"\" begins and ends a message of several lines."""

Messages = list[dict[str, str]]
Pieces = Iterator[tuple[str, int]]  # (text, number of tokens in it)
Backend = Callable[[Messages], Pieces]


def chat(
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    url: Annotated[str | None, typer.Option(help="Use this server instead, e.g. http://127.0.0.1:8000/v1.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's key.", show_envvar=True)
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    model: Model = DEFAULT.model,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    memory: Memory = None,
    attention: Attention = None,
    kv_dtype: KvDtype = None,
    num_blocks: NumBlocks = None,
    kv_memory: KvMemory = None,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    speculate: Speculate = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
) -> None:
    """Talk with a chat model, here or on an OpenAI-compatible server."""
    options = given(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, seed=seed)
    settings = given(
        memory=memory, attention=attention, kv_dtype=kv_dtype, speculate=speculate,
        num_speculative_tokens=num_speculative_tokens,
    ) | pool(num_blocks, kv_memory, max_num_seqs, max_model_len)  # fmt: skip
    if url is None:
        sampling(**options)  # rejects wrong values before the model is loaded
        settings = {"max_num_seqs": 1} | settings  # there is one user
        llm = load(model, device=device, dtype=dtype, **settings)
        params, line = own_sampling(llm, options, temperature=CHAT_TEMPERATURE)
        backend = _embedded(llm, params)
        print(line)
    elif settings or (device, dtype) != (DEFAULT.device, DEFAULT.dtype):
        what = "device, dtype, memory, attention, kv-dtype, speculate and the pool's size"
        raise InvalidRequest(f"{what} are the server's business; leave them out with --url")
    else:
        backend = _remote(url, api_key, model, options)
    Chat(backend, system).run()


class Chat:
    """The conversation so far, and the commands that change it."""

    def __init__(self, backend: Backend, system: str | None) -> None:
        self._backend = backend
        self._system = system
        self._messages: Messages = []

    def run(self) -> None:
        """Reads messages and commands until the input ends, or Ctrl-C at the prompt."""
        print("Type a message; /help lists the commands.")
        for text in _texts():
            name, _, rest = text.partition(" ")
            if name == "/exit":
                return
            if name.startswith("/") and "\n" not in text:
                self._obey(name, rest.strip())
            else:
                self._answer(text)

    def _obey(self, name: str, rest: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system, "/save": self._save, "/load": self._load, "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }  # fmt: skip
        if name not in commands:
            return print(f"There is no {name}; /help lists the commands.")
        try:
            commands[name](rest)
        except (OSError, ValueError) as error:
            fail(str(error))

    def _reset(self, _: str) -> None:
        self._messages = []
        print("The conversation is empty again.")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
        print(f"System prompt: {self._system or 'none'}")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        Path(name).write_text(json.dumps({"messages": self._all()}, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"Saved {len(self._messages)} messages.")

    def _load(self, name: str) -> None:
        if not name:
            raise ValueError("/load needs the name of a file")
        saved = json.loads(Path(name).read_text("utf-8"))
        messages = saved.get("messages") if isinstance(saved, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f"{name} is not a saved conversation")
        self._system = next((m["content"] for m in messages if m["role"] == "system"), None)
        self._messages = [message for message in messages if message["role"] != "system"]
        print(f"Loaded {len(self._messages)} messages.")

    def _all(self) -> Messages:
        return ([{"role": "system", "content": self._system}] if self._system else []) + self._messages

    def _answer(self, text: str) -> None:
        """Streams the model's answer. Keeps both messages, also of a stopped answer; neither after an error."""
        user = {"role": "user", "content": text}
        try:
            answer = _print(self._backend([*self._all(), user]))
        except InvalidRequest as error:  # most often, the conversation is longer than the model allows
            fail(f"{error} (/reset forgets the conversation)")
        except ServerError as error:
            fail(str(error))
        else:
            self._messages += [user, {"role": "assistant", "content": answer}]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
    )


def _print(pieces: Pieces) -> str:
    """Prints an answer while it is generated, until its end or Ctrl-C, and returns it."""
    texts, tokens, began = [], 0, time.perf_counter()
    with _interruptible() as stopped:
        for text, count in pieces:
            print(text, end="", flush=True)
            texts.append(text)
            tokens += count
            if stopped:
                break
        getattr(pieces, "close", lambda: None)()  # ends the request, in the engine or at the server
    print()
    seconds = time.perf_counter() - began
    if sys.stdout.isatty():
        stop = "stopped; " if stopped else ""
        print(f"\033[2m[{stop}{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s]\033[0m")
    return "".join(texts)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C only appends to the list: an exception in the middle of a step would break the engine's bookkeeping.

    A second Ctrl-C raises KeyboardInterrupt.
    """
    stopped: list[int] = []

    def note(number: int, frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


# --- what the user types ----------------------------------------------------------------------------------------


def _texts() -> Iterator[str]:
    """Yields messages and commands until the input ends."""
    with _history():
        while True:
            try:
                text = _text()
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print()
                raise
            if text:
                yield text


def _text() -> str:
    """Reads one message, which may have several lines."""
    line = input("> ").strip()
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("... "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip()
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... ").rstrip())
    return "\n".join(lines).strip()


@contextmanager
def _history() -> Iterator[None]:
    """Enables arrow keys and the history of earlier conversations, if there is a terminal and readline."""
    try:
        import readline  # Windows has none
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "minipaged" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError:  # continue without a history
        pass
    readline.set_history_length(1000)
    try:
        yield
    finally:
        try:
            readline.write_history_file(file)
        except OSError:
            pass


# --- backends ---------------------------------------------------------------------------------------------------


class ServerError(MinipagedError, RuntimeError):
    """The server could not be reached or answered with an error."""


def _embedded(llm: Any, params: SamplingParams) -> Backend:
    llm.render_chat([{"role": "user", "content": "Hi"}])  # raises now if the model cannot chat

    def answer(messages: Messages) -> Pieces:
        deltas = llm.stream_chat(messages, params)
        try:
            for delta in deltas:
                yield delta.text, len(delta.token_ids)
        finally:
            deltas.close()

    return answer


def _remote(url: str, api_key: str | None, model: str, options: dict[str, Any]) -> Backend:
    import httpx2

    from minipaged.server.client import RequestFailed, events

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx2.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=httpx2.Timeout(600, connect=10))

    def answer(messages: Messages) -> Pieces:
        body = {"model": model, "messages": messages, "stream": True, **options}
        try:
            with client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                for event in events(response, response.iter_lines()):
                    for choice in event.get("choices", ()):
                        text = choice.get("delta", {}).get("content")
                        if text:
                            yield text, 1  # servers usually send one chunk per token
        except httpx2.InvalidURL as error:
            raise InvalidRequest(f"{url} is not a URL: {error}") from None
        except (httpx2.HTTPError, RequestFailed) as error:
            raise ServerError(f"{url}: {str(error) or type(error).__name__}") from None

    return answer
