"""An experiment's figure as an HTML page, in the same fonts as the visualizer's page. Needs plotly."""

from __future__ import annotations

from html import escape
from typing import Any

from visualizer.styles import SANS, font_faces, inline

# Plotly measures each text once and keeps the result, so the fonts must be there first.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
%(fonts)sbody { margin: 0; } #figure { height: 100vh; }
</style>
<script src="plotly.min.js"></script></head>
<body><div id="figure"></div>
<script>
const figure = %(figure)s;
Promise.allSettled([...document.fonts].map((face) => face.load())).then(() => {
  Plotly.newPlot("figure", figure.data, figure.layout, { responsive: true });
});
</script></body></html>
"""


def figure_page(figure: dict[str, Any], title: str) -> str:
    """The page's HTML. The fonts are inside; ``plotly.min.js`` must be in the same folder."""
    from plotly import io

    font = {"font": {"family": ", ".join(SANS)}}
    layout = figure.get("layout", {}) | font | {"hoverlabel": font}  # hover labels do not inherit the font
    data = io.to_json(figure | {"layout": layout})  # it escapes "<", so no text ends the script
    return PAGE % {"title": escape(title), "fonts": font_faces(inline), "figure": data}
