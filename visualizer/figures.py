"""The page's charts, built here once and fed in the browser."""

from __future__ import annotations

import plotly.graph_objects as go


def memory_figure() -> go.Figure:
    """Reserved slots, filled slots and tokens over the steps.

    Three lines rather than two: where sequences share blocks, the tokens they see are more than the slots
    filled for them, and only reserved minus filled is waste.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[], y=[], name="slots reserved", mode="lines",
        line={"color": "#56b4e9", "width": 1.5, "shape": "hv"},
        fill="tozeroy", fillcolor="rgba(86,180,233,0.18)", hovertemplate="%{y} slots reserved<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="slots filled", mode="lines", line={"color": "#0072b2", "width": 2},
        fill="tozeroy", fillcolor="rgba(0,114,178,0.25)", hovertemplate="%{y} slots filled<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[], y=[], name="tokens, sharing not counted", mode="lines",
        line={"color": "#e69f00", "width": 2, "dash": "dot"},
        hovertemplate="%{y} tokens in all<extra></extra>",
    )  # fmt: skip
    figure.add_shape(
        type="line", xref="paper", x0=0, x1=1, y0=0, y1=0, line={"width": 1, "dash": "dash", "color": "#888"}
    )
    figure.add_annotation(
        xref="paper", x=1, y=0, xanchor="right", yanchor="bottom", showarrow=False, text="", font={"size": 10}
    )
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "Helvetica Neue, Arial, sans-serif", "size": 11},
        margin={"l": 40, "r": 8, "t": 22, "b": 22},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        xaxis={"zeroline": False, "nticks": 6, "title": None, "fixedrange": True},
        yaxis={"zeroline": False, "rangemode": "tozero", "nticks": 4, "fixedrange": True},
        hovermode="x unified",
        autosize=True,
    )
    return figure
