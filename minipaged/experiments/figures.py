"""Plotly figures as plain dicts, so that building one does not need plotly."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")  # Okabe and Ito's


def bars(
    title: str, x: Seq[Any], series: Mapping[str, Seq[float | None]], y_title: str, *, stacked: bool = False
) -> dict[str, Any]:
    """One group of bars for each x, one colour for each series."""
    data = [
        {"type": "bar", "name": name, "x": list(map(str, x)), "y": list(y), "marker": {"color": colour}}
        for (name, y), colour in zip(series.items(), COLOURS[: len(series)], strict=True)
    ]
    layout = _layout(title, "", y_title)
    return {"data": data, "layout": layout | {"barmode": "stack" if stacked else "group"}}


def lines(
    title: str,
    series: Mapping[str, tuple[Seq[float], Seq[float]]],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    threshold: float | None = None,
    y_max: float | None = None,
) -> dict[str, Any]:
    """One line for each series of (x, y); ``threshold`` is a horizontal dotted line.

    From the eighth series on, the colours repeat and the lines are dashed.
    """
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(x),
            "y": list(y),
            "line": {"color": COLOURS[i % len(COLOURS)]} | ({"dash": "dash"} if i >= len(COLOURS) else {}),
        }
        for i, (name, (x, y)) in enumerate(series.items())
    ]
    layout = _layout(title, x_title, y_title)
    if log_x:
        layout["xaxis"]["type"] = "log"
    if y_max is not None:
        layout["yaxis"]["range"] = [0, y_max]
    if threshold is not None:
        across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": threshold, "y1": threshold}
        layout["shapes"] = [across | {"line": {"dash": "dot", "color": "#555555"}}]
    return {"data": data, "layout": layout}


def _layout(title: str, x_title: str, y_title: str) -> dict[str, Any]:
    return {
        "title": {"text": title},
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": y_title}, "rangemode": "tozero"},
        "template": "plotly_white",
    }
