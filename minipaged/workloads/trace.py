"""Traces: requests with their arrival times, lengths and shared prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

MAX_HISTORY = 1024  # last tokens of a conversation that the paper's chatbot gets as prompt (§6.5)


@dataclass(frozen=True)
class TraceRequest:
    """One request. Its tokens are not stored: `token_ids` makes them, the same each time.

    Attributes:
        arrival: seconds from the start of the trace.
        num_prompt: tokens of the prompt, the shared prefix included.
        num_output: tokens of each output.
        stream: which conversation it belongs to. Requests of one stream continue each other; two streams share nothing.
        n: samples asked for.
        beam_width: beams, if it is a beam search.
        prefix: which shared prefix the prompt begins with, if any.
        prefix_tokens: length of that prefix.
        offset: position in its stream at which the prompt begins: above 0 if the conversation was cut at the front.
        failed: the trace records no answer (BurstGPT's rows without response tokens).
    """

    arrival: float
    num_prompt: int
    num_output: int
    stream: int = 0
    n: int = 1
    beam_width: int | None = None
    prefix: int | None = None
    prefix_tokens: int = 0
    offset: int = 0
    failed: bool = False

    def token_ids(self, vocab_size: int) -> list[int]:
        """The prompt: the prefix that all requests with this ``prefix`` share, then the stream's own tokens."""
        shared = self.prefix_tokens if self.prefix is not None else 0
        head = [_token(-1 - (self.prefix or 0), i, vocab_size) for i in range(shared)]
        return head + [self.token(i, vocab_size) for i in range(shared, self.num_prompt)]

    def token(self, position: int, vocab_size: int, sample: int = 0) -> int:
        """The token at a position of prompt or output. Samples of a request differ; the next turn contains sample 0."""
        return _token((self.stream << 8) + sample, self.offset + position, vocab_size)


def _token(stream: int, position: int, vocab_size: int) -> int:
    # Any hash works that gives two streams no common run of tokens.
    return ((stream * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) >> 20) % vocab_size


def trace(
    lengths: Iterator[tuple[int, int]], times: Iterable[float], n: int = 1, beam_width: int | None = None
) -> list[TraceRequest]:
    """Independent requests; with ``n`` parallel sampling, with ``beam_width`` beam searches (paper §6.3)."""
    return [
        TraceRequest(time, *next(lengths), stream=stream, n=n, beam_width=beam_width)
        for stream, time in enumerate(times)
    ]


def shared_prefix(
    lengths: Iterator[tuple[int, int]], times: Iterable[float], prefix_tokens: int, num_prefixes: int = 1
) -> list[TraceRequest]:
    """Requests whose prompts begin with the same examples; several prefixes are used in turn.

    The paper's translations begin with one example (80 tokens) or five (341), §6.4.
    """
    return [
        TraceRequest(
            time,
            prefix_tokens + num_prompt,
            num_output,
            stream=stream,
            prefix=stream % num_prefixes,
            prefix_tokens=prefix_tokens,
        )
        for stream, (time, (num_prompt, num_output)) in enumerate(zip(times, lengths, strict=False))
    ]


def chat(lengths: Iterator[tuple[int, int]], times: Iterable[float], seed: int, turns: int = 5) -> list[TraceRequest]:
    """Conversations: each prompt is the conversation so far and a new question, cut to the last 1024 tokens (§6.5).

    At each of the ``times`` one of the open conversations, drawn at random, continues; after ``turns`` it ends and
    another begins. Outputs have at most 1024 tokens. The number of turns of a conversation is an assumption.
    """
    rng = Random(f"chat/{seed}")
    open_chats: list[tuple[int, int, int]] = [(stream, 0, 0) for stream in range(20)]  # stream, tokens, turns so far
    next_stream = len(open_chats)
    requests = []
    for time in times:
        index = rng.randrange(len(open_chats))
        stream, said, turn = open_chats[index]
        question, answer = next(lengths)
        answer = min(answer, MAX_HISTORY)
        said += question
        num_prompt = min(said, MAX_HISTORY)
        requests.append(TraceRequest(time, num_prompt, answer, stream=stream, offset=said - num_prompt))
        if turn + 1 == turns:
            open_chats[index] = (next_stream, 0, 0)
            next_stream += 1
        else:
            open_chats[index] = (stream, said + answer, turn + 1)
    return requests
