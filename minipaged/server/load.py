"""A load generator for OpenAI-compatible servers: sends requests at given times and reports their latencies.

The load is *open*: each request is sent at its arrival time, whether or not earlier ones have been answered, because
real users do not wait for each other. Latencies count from the arrival time, so a server cannot look better by delaying
its clients.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import Any

import httpx2

from minipaged.errors import InvalidRequest
from minipaged.experiments.figures import lines
from minipaged.experiments.result import Result, Row, machine
from minipaged.server.client import RequestFailed, aevents, check
from minipaged.workloads import TraceRequest

WORDS = (
    "time story house river light stone garden winter music letter morning bridge window forest silver paper engine "
    "summer market island candle shadow harbor copper"
).split()


@dataclass
class Sample:
    """One request and its answer. Times are seconds since the start of the run."""

    due: float
    chunks: list[float] = field(default_factory=list)  # the arrival time of each chunk of text
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def first_token(self) -> float:
        return self.chunks[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks. A chunk is usually one token, and more when the network is slower than the server."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def normalized(self) -> float:
        """Normalized latency: seconds per output token (PagedAttention paper §6.1); an empty answer counts as one."""
        return (self.ended - self.due) / max(1, self.output_tokens)


@dataclass(frozen=True)
class Target:
    """The server under load, and the options of every request."""

    url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = False


def prompt_of(request: TraceRequest) -> str:
    """A prompt of about ``request.num_prompt`` tokens; requests that share a prefix begin with the same words."""
    return " ".join(WORDS[token] for token in request.token_ids(len(WORDS)))


async def first_model(url: str, api_key: str | None) -> str:
    """The name of the server's first model. Raises `RequestFailed`."""
    async with _client(url, api_key) as client:
        try:
            response = await client.get("models")
            check(response)
            return response.json()["data"][0]["id"]
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestFailed(f"{url} names no model: {str(error) or type(error).__name__}") from None


async def run(
    target: Target, requests: Sequence[TraceRequest], progress: Callable[[int], None] = lambda done: None
) -> list[Sample]:
    """Sends every request at its arrival time and waits for all answers; a failed one has an ``error``.

    ``progress`` is called with the number of finished requests.
    """
    done = 0
    began = time.perf_counter()

    async def one(request: TraceRequest) -> Sample:
        nonlocal done
        await asyncio.sleep(began + request.arrival - time.perf_counter())
        sample = Sample(request.arrival)
        try:
            await _ask(client, target, request, sample, began)
        except (httpx2.HTTPError, RequestFailed) as error:
            sample.error = str(error)[:200] or type(error).__name__
        sample.ended = time.perf_counter() - began
        done += 1
        progress(done)
        return sample

    async with _client(target.url, target.api_key) as client:
        return list(await asyncio.gather(*map(one, requests)))


def _client(url: str, api_key: str | None) -> httpx2.AsyncClient:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=None)  # the arrival times alone limit the load
    try:
        return httpx2.AsyncClient(base_url=url.rstrip("/") + "/", headers=headers, timeout=600, limits=limits)
    except httpx2.InvalidURL as error:
        raise InvalidRequest(f"{url} is not a URL: {error}") from None


async def _ask(client: httpx2.AsyncClient, target: Target, request: TraceRequest, sample: Sample, began: float) -> None:
    body: dict[str, Any] = {
        "model": target.model, "prompt": prompt_of(request), "max_tokens": request.num_output, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if target.ignore_eos:
        body["ignore_eos"] = True
    async with client.stream("POST", "completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
        check(response)
        usage: dict[str, Any] | None = None
        async for event in aevents(response.aiter_lines()):
            if any(choice.get("text") for choice in event.get("choices", ())):
                sample.chunks.append(time.perf_counter() - began)
            usage = event.get("usage") or usage
    if usage is None:
        raise RequestFailed("the server reports no usage")
    sample.prompt_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if not sample.chunks:  # the model ended its answer at once, which is an answer, too
        sample.chunks.append(time.perf_counter() - began)


@dataclass(frozen=True)
class Goal:
    """Latency limits in seconds: a request counts for goodput if it meets both."""

    first_token: float = 1.0
    token: float = 0.1  # mean of the gaps between its tokens

    def met(self, sample: Sample) -> bool:
        return sample.first_token <= self.first_token and fmean(sample.gaps or [0.0]) <= self.token


def summarize(samples: Sequence[Sample], duration: float, goal: Goal, target: Target) -> Result:
    """Throughput, goodput and latency percentiles, with the distributions as a figure.

    Requests arrived for ``duration`` seconds. Raises `RequestFailed` if none was answered.
    """
    good = [sample for sample in samples if not sample.error]
    errors = Counter(sample.error for sample in samples if sample.error)
    if not good:
        raise RequestFailed(f"none of {len(samples)} requests was answered: {errors.most_common(1)[0][0]}")
    seconds = max(duration, *(sample.ended for sample in samples))
    series = {
        "time to first token": [sample.first_token for sample in good],
        "between tokens": [gap for sample in good for gap in sample.gaps] or [0.0],
        "normalized latency": [sample.normalized for sample in good],
    }
    rows = [
        Row("requests answered", len(good)),
        Row("requests that failed", sum(errors.values())),
        Row("offered", len(samples) / duration, "requests/s"),
        Row("throughput", len(good) / seconds, "requests/s"),
        Row(f"goodput ({goal.first_token:g} s, {goal.token:g} s)", sum(map(goal.met, good)) / seconds, "requests/s"),
        Row("output", sum(sample.output_tokens for sample in good) / seconds, "tokens/s"),
        Row("prompts", sum(sample.prompt_tokens for sample in good) / seconds, "tokens/s"),
    ]
    for name, values in series.items():
        unit = "s/token" if name.startswith("normalized") else "s"
        rows.append(Row(f"{name}, mean", fmean(values), unit))
        rows += [Row(f"{name}, p{p}", percentile(values, p), unit) for p in (50, 90, 99)]
    return Result(
        rows,
        _figure(series),
        [f"{message}: {count} requests" for message, count in errors.most_common(5)],
        {"target": {"url": target.url, "model": target.model}, "samples": [vars(sample) for sample in samples]},
        name="serve",
        title=f"Load on {target.url}",
        seconds=seconds,
        machine=machine(),
    )


def percentile(values: Sequence[float], p: int) -> float:
    return quantiles(values, n=100, method="inclusive")[p - 1] if len(values) > 1 else values[0]


def _figure(series: dict[str, list[float]]) -> dict[str, Any]:
    """For each latency, the fraction of requests or tokens at or below it (the cumulative distribution)."""
    curves = {}
    for name, values in series.items():
        ranked = sorted(values)[:: max(1, len(values) // 500)]
        curves[name] = ranked, [(i + 1) / len(ranked) for i in range(len(ranked))]
    return lines("Latency: how many had to wait no longer", curves, "seconds", "fraction", log_x=True, y_max=1.05)
