"""Plotly figures of the page's charts: built here without data, filled with data in the browser.

The browser finds two shapes by name: "moment", the vertical line at the step that the page shows, and "pool", the
horizontal line at the pool's size.
"""

from __future__ import annotations

import json
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from visualizer.styles import SANS

BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY = "#0072b2 #e69f00 #009e73 #d55e00 #56b4e9 #cc79a7 #888888".split()

# As in minipaged.events.waste.MANAGERS, in that order.
MANAGER_LINES = (
    ("Max", RED, "solid"),
    ("Pow2", ORANGE, "dash"),
    ("Oracle", PINK, "dashdot"),
    ("vAttention", GREEN, "dot"),
    ("paged", BLUE, "solid"),
)


def figures() -> dict[str, go.Figure]:
    """All figures, keyed by the name of the tab that shows them."""
    return {
        "memory": memory_figure(),
        "waste": waste_figure(),
        "throughput": throughput_figure(),
        "latency": latency_figure(),
        "sequences": sequences_figure(),
        "prefix": prefix_figure(),
    }


def figures_as_json() -> dict[str, Any]:
    """All figures as JSON-compatible objects for plotly.js."""
    return {name: json.loads(figure.to_json()) for name, figure in figures().items()}


def memory_figure() -> go.Figure:
    """Reserved slots, filled slots and tokens per step; the process' resident memory on an axis of its own.

    Tokens need a line of their own: sequences that share blocks have more tokens than filled slots in total. Only
    reserved minus filled slots is waste.
    """
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    figure.add_scatter(
        x=[], y=[], name="reserved", mode="lines",
        line={"color": SKY, "width": 1.5, "shape": "hv"},
        fill="tozeroy", fillcolor="rgba(86,180,233,0.18)", hovertemplate="%{y} slots reserved<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="filled", mode="lines", line={"color": BLUE, "width": 2},
        fill="tozeroy", fillcolor="rgba(0,114,178,0.25)", hovertemplate="%{y} slots filled<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="tokens in all", mode="lines",
        line={"color": ORANGE, "width": 2, "dash": "dot"},
        hovertemplate="%{y} tokens in all<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="RSS, MiB", mode="lines", line={"color": GREEN, "width": 1.5},
        hovertemplate="%{y} MiB of memory in all<extra></extra>", secondary_y=True,
    )  # fmt: skip
    _pool_line(figure)
    _styled(figure)
    figure.update_yaxes(showgrid=False, tickformat="d", tickmode="auto", nticks=3, secondary_y=True)
    figure.update_xaxes(domain=[0, 1])
    return figure.update_layout(margin={"r": 34}, legend={"entrywidth": 0.24, "entrywidthmode": "fraction"})


def waste_figure() -> go.Figure:
    """The slots that each memory manager would hold for the same sequences, and the number of their tokens."""
    figure = go.Figure()
    for name, color, dash in MANAGER_LINES:
        figure.add_scatter(
            x=[], y=[], name=name, mode="lines", line={"color": color, "width": 2, "dash": dash, "shape": "hv"},
            hovertemplate=f"{name}: %{{y}} slots<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="tokens", mode="lines", line={"color": GREY, "width": 1}, showlegend=False,
        fill="tozeroy", fillcolor="rgba(0,114,178,0.15)", hovertemplate="tokens (paged): %{y}<extra></extra>",
    )  # fmt: skip
    _pool_line(figure)
    return _styled(figure).update_layout(legend={"entrywidth": 0.2, "entrywidthmode": "fraction"})


def throughput_figure() -> go.Figure:
    """Three small charts per step: tokens computed (batch size), step time in ms, and throughput in tokens/s."""
    figure = make_subplots(
        rows=1, cols=3, horizontal_spacing=0.08, subplot_titles=(
            f"tokens: <b style='color:{BLUE}'>decode</b> + <b style='color:{ORANGE}'>prefill</b>",
            "milliseconds a step",
            "tokens a second",
        )
    )  # fmt: skip
    for name, color in (("decode", BLUE), ("prefill", ORANGE)):
        figure.add_bar(
            x=[], y=[], name=name, marker={"color": color, "line": {"width": 0}}, row=1, col=1,
            hovertemplate=f"%{{y}} {name}<extra></extra>",
        )  # fmt: skip
    for column, (name, color, unit) in enumerate((("step time", GREEN, "ms"), ("tokens per second", RED, "/s")), 2):
        figure.add_scatter(
            x=[], y=[], name=name, mode="lines", line={"color": color, "width": 1.5}, row=1, col=column,
            hovertemplate=f"%{{y:.1f}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.update_annotations(font={"size": 11})
    return _styled(figure, barmode="stack", bargap=0, showlegend=False)


def latency_figure() -> go.Figure:
    """Latency: each request's time to first token (TTFT), and the inter-token latency (ITL) at p50, p95 and p99."""
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.42, 0.58], horizontal_spacing=0.08, subplot_titles=(
            "to the first token, ms",
            f"to the next, ms: <b style='color:{BLUE}'>p50</b>, <b style='color:{ORANGE}'>p95</b>, "
            f"<b style='color:{RED}'>p99</b>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], text=[], name="first token", mode="markers+text", textposition="top center", textfont={"size": 10},
        marker={"size": 8, "color": [], "line": {"width": 0}}, row=1, col=1, cliponaxis=False,
        hovertemplate="%{text}: first token after %{y:.1f} ms<extra></extra>",
    )  # fmt: skip
    for name, color, dash in (("p50", BLUE, "solid"), ("p95", ORANGE, "dash"), ("p99", RED, "dot")):
        figure.add_scatter(
            x=[], y=[], name=name, mode="lines", line={"color": color, "width": 1.5, "dash": dash}, row=1, col=2,
            hovertemplate=f"{name}: %{{y:.1f}} ms<extra></extra>",
        )  # fmt: skip
    figure.update_annotations(font={"size": 11})
    # A preempted request waits a hundred times as long as the others; on a log axis both can be read.
    return _styled(figure, showlegend=False).update_yaxes(type="log", nticks=5, row=1, col=2)


def sequences_figure() -> go.Figure:
    """A Gantt chart with one row per sequence: the colour and letter name the sequence, the fill shows its state."""
    figure = go.Figure()
    looks: dict[str, dict[str, Any]] = {
        "waiting": {"opacity": 0.28},
        "prefill": {"pattern": {"shape": "/", "size": 4, "solidity": 0.4, "fgcolor": "#ffffff"}},
        "decode": {},
        "preempted": {"opacity": 0.9, "color": "rgba(213,94,0,0.12)", "line": {"color": RED, "width": 1.5}},
    }
    for name, marker in looks.items():
        figure.add_bar(
            x=[], y=[], base=[], name=name, orientation="h", marker=marker, width=0.72, customdata=[],
            hovertemplate="%{customdata}<extra></extra>", showlegend=False,
        )  # fmt: skip
    _styled(figure, barmode="overlay", margin_top=6)
    figure.update_yaxes(autorange=False, showgrid=False, ticklen=0, rangemode="normal")
    return figure.update_layout(hovermode="closest", margin={"l": 26})


def prefix_figure() -> go.Figure:
    """The prefix cache's hit rate, the number of blocks in it, and the number of evicted blocks."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    figure.add_scatter(
        x=[], y=[], name="hit rate so far, %", mode="lines", line={"color": GREEN, "width": 2.5, "shape": "hv"},
        hovertemplate="%{y:.1f} % of prompt tokens were cached<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="blocks in the cache", mode="lines", line={"color": BLUE, "width": 1.5, "shape": "hv"},
        hovertemplate="%{y} blocks in the cache<extra></extra>", secondary_y=True,
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="evicted so far", mode="lines",
        line={"color": RED, "width": 1.5, "dash": "dot", "shape": "hv"},
        hovertemplate="%{y} blocks evicted<extra></extra>", secondary_y=True,
    )  # fmt: skip
    _styled(figure)
    figure.update_yaxes(range=[0, 100], ticksuffix=" %", secondary_y=False)
    figure.update_yaxes(showgrid=False, tickformat="d", secondary_y=True)
    return figure.update_layout(margin={"r": 34})


def _pool_line(figure: go.Figure) -> None:
    """Adds the line at the pool's size, which paging never exceeds."""
    figure.add_shape(
        name="pool", type="line", xref="paper", x0=0, x1=1, y0=0, y1=0,
        line={"width": 1, "dash": "dash", "color": GREY},
    )  # fmt: skip
    figure.add_annotation(
        name="pool", xref="paper", x=1, y=0, xanchor="right", yanchor="bottom", showarrow=False, text="",
        font={"size": 10},
    )  # fmt: skip


def _styled(figure: go.Figure, margin_top: int = 22, **layout: Any) -> go.Figure:
    """Applies the common compact style, and adds the "moment" line to each of the figure's charts."""
    axes = {trace.xaxis or "x" for trace in figure.data}
    for axis in sorted(axes):
        figure.add_shape(
            name="moment", type="line", xref=axis, yref="y domain" if axis == "x" else f"y{axis[1:]} domain",
            x0=0, x1=0, y0=0, y1=1, line={"width": 2, "color": RED}, visible=False,
        )  # fmt: skip
    figure.update_xaxes(zeroline=False, nticks=6, title=None, fixedrange=True)
    figure.update_yaxes(zeroline=False, rangemode="tozero", nticks=4, fixedrange=True)
    return figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": ", ".join(SANS), "size": 11},
        hoverlabel={"font": {"family": ", ".join(SANS)}},
        margin={"l": 40, "r": 8, "t": margin_top, "b": 22},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "font": {"size": 10.5}},
        hovermode="x unified",
        autosize=True,
        **layout,
    )
