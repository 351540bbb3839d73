"""Loads BurstGPT: ten million requests to ChatGPT and GPT-4 on a campus, with times (Wang et al., arXiv 2401.17644).

The CSV files are published with the paper (github.com/HPMLL/BurstGPT, CC-BY 4.0) and are not part of this package. The
first files have the columns Timestamp, Model, Request tokens, Response tokens, Total tokens, Log Type; a later one has
Session ID and Elapsed time after the first. So columns are found by name, and unneeded ones may be missing.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from minipaged.errors import InvalidTrace
from minipaged.workloads.trace import TraceRequest

NEEDED = ("Timestamp", "Request tokens", "Response tokens")


def load_burstgpt(path: str | Path, rate: float | None = None, limit: int | None = None) -> list[TraceRequest]:
    """The requests of a file in order of arrival, the first at time 0; times are seconds.

    A request without response tokens failed: it is kept and flagged, because it did arrive. ``rate`` (requests per
    second, including failed ones) scales all times; burstiness stays as it is. ``limit`` takes the first rows only.
    Raises `InvalidTrace`, with the line, for a file that is no BurstGPT trace.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"rate must be positive, not {rate}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            requests = sorted(islice(_rows(path, csv.DictReader(file)), limit), key=lambda r: r.arrival)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidTrace(f"{path} cannot be read as CSV: {error}") from error
    if not requests:
        raise InvalidTrace(f"{path} has no rows below its header")
    start, span = requests[0].arrival, requests[-1].arrival - requests[0].arrival
    if rate is not None and span == 0:
        raise InvalidTrace(f"all requests of {path} come at the same time; there is no rate to scale")
    factor = 1.0 if rate is None else (len(requests) - 1) / (rate * span)
    return [replace(request, arrival=(request.arrival - start) * factor) for request in requests]


def _rows(path: str | Path, reader: csv.DictReader) -> Iterator[TraceRequest]:
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidTrace(f"{path} is no BurstGPT trace: its first line has no column {', '.join(missing)}")
    for stream, row in enumerate(reader):
        try:
            arrival = float(row["Timestamp"])
            num_prompt, num_output = _count(row["Request tokens"]), _count(row["Response tokens"])
            if not math.isfinite(arrival):
                raise ValueError(f"{arrival} is no time")
        except (TypeError, ValueError) as error:
            raise InvalidTrace(f"{path}, line {reader.line_num}: {error}") from None
        yield TraceRequest(arrival, num_prompt, num_output, stream=stream, failed=num_output == 0)


def _count(text: str | None) -> int:
    if text is None:
        raise ValueError("the line ends too early")
    count = float(text)  # some tools write 472 as 472.0
    if not (count >= 0 and count.is_integer()):
        raise ValueError(f"{text} is no number of tokens")
    return int(count)
