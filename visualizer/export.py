"""Exports the page as one HTML file without a server: scripts, styles and fonts inline, and a recording to play.

Modules cannot import each other from file:// URLs, so each becomes a ``data:`` URL in an import map. The file contains
the live page's plotly.js, gzipped from 4.8 to 2 MB, which still fits into an e-mail; one of plotly's smaller builds
would be another file to ship.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from functools import cache
from pathlib import Path

import plotly

from visualizer.charts import figures_as_json
from visualizer.sources import sources
from visualizer.styles import STATIC, inline, styles

PLOTLY = Path(plotly.__file__).resolve().parent / "package_data" / "plotly.min.js"
GAP = "THE RECORDING"  # placeholder (as a JSON string) for the recording's text

# Styles that Gradio provides on the live page: colours for light and dark mode, and resets of the browser's defaults.
BASE = """
:root { --body-text-color: #1f2937; --background-fill-primary: #fff; --background-fill-secondary: #f8fafc;
  --border-color-primary: #e2e8f0; }
.dark { --body-text-color: #f1f5f9; --background-fill-primary: #1e293b; --background-fill-secondary: #0f172a;
  --border-color-primary: #334155; color-scheme: dark; }
html, body { margin: 0; background: var(--background-fill-secondary); }
.mp h2 { line-height: 1.35; }
"""

BOOT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.body.classList.toggle("dark", dark.matches);
dark.addEventListener("change", follow);
follow();
const given = (name) => document.getElementById(name).textContent;
// The data is gzip in base64. A browser without DecompressionStream shows everything but the charts.
const unpack = async (packed) => {
  const stream = new Blob([Uint8Array.from(atob(packed), (char) => char.charCodeAt(0))]).stream();
  return URL.createObjectURL(await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).blob());
};
const text = JSON.parse(given("recording"));
const plotly = await unpack(given("plotly")).catch(() => null);
const server = new Proxy({}, { get: () => async () => ({}) }); // there is no server
const { start } = await import("minipaged/main.js");
start({ element: document.body, server, plotly, figures: plotly && JSON.parse(given("figures")),
  more: { sources: JSON.parse(given("sources")), exported: true, replay: { name: "an exported run", text } } });
"""


def page() -> str:
    """The exported page's HTML, with ``GAP`` as a JSON string in place of the recording."""
    scripts = {f"minipaged/{path.name}": _module(path) for path in sorted(STATIC.glob("*.js"))}
    body = (STATIC / "page.html").read_text(encoding="utf-8")
    icon = base64.b64encode((STATIC / "favicon.svg").read_bytes()).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minipaged: an exported run</title><link rel="icon" href="data:image/svg+xml;base64,{icon}">
<style>{BASE}{styles(inline)}</style>
<script type="importmap">{_json({"imports": scripts})}</script></head>
<body><main>{body}</main>
<script type="application/json" id="sources">{_json(sources())}</script>
<script type="application/json" id="figures">{_json(figures_as_json())}</script>
<script type="text/plain" id="plotly">{_packed_plotly()}</script>
<script type="application/json" id="recording">{json.dumps(GAP)}</script>
<script type="module">{BOOT}</script></body></html>
"""


def export(recording: str) -> str:
    """The exported page's HTML with the given recording's text embedded."""
    return page().replace(json.dumps(GAP), _json(recording))


@cache
def _packed_plotly() -> str:
    return base64.b64encode(gzip.compress(PLOTLY.read_bytes(), mtime=0)).decode()


def _module(path: Path) -> str:
    """A script as a ``data:`` URL. Its relative imports become names in the import map, since they cannot resolve."""
    code = re.sub(r'from "\./(\w+\.js)"', r'from "minipaged/\1"', path.read_text(encoding="utf-8"))
    return "data:text/javascript;base64," + base64.b64encode(code.encode()).decode()


def _json(value: object) -> str:
    """JSON without ``<``, so that no string in it can end the surrounding script element."""
    return json.dumps(value).replace("<", "\\u003c")
