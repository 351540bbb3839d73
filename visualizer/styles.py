"""The page's style sheets as one text, and its fonts. No plotly, no gradio: the labs' report has these fonts, too."""

from __future__ import annotations

import base64
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path

STATIC = Path(__file__).resolve().parent / "static"
SANS = ("Inter", "JetBrains Mono", "sans-serif")  # each has what the one before lacks; style.css says the same
MONO = ("JetBrains Mono", "Inter", "monospace")


def styles(address: Callable[[Path], str]) -> str:
    """All styles. ``address`` says where the page finds a font's file."""
    others = sorted(STATIC.glob("*.css"), key=lambda path: (path.name != "style.css", path.name))  # they refine it
    text = "\n".join(path.read_text(encoding="utf-8") for path in others if path.name != "fonts.css")
    return font_faces(address) + text


def font_faces(address: Callable[[Path], str]) -> str:
    """fonts.css, with addresses in place of the files' names."""
    text = (STATIC / "fonts.css").read_text(encoding="utf-8")
    return re.sub(r'url\("(fonts/[\w-]+\.woff2)"\)', lambda found: f'url("{address(STATIC / found[1])}")', text)


def served(path: Path) -> str:
    """Where Gradio serves the file. Relative to the page's address, as behind a proxy."""
    return "gradio_api/file=" + urllib.parse.quote(path.as_posix(), safe="/:")


def inline(path: Path) -> str:
    """The file itself as an address, for pages that need no server."""
    return "data:font/woff2;base64," + base64.b64encode(path.read_bytes()).decode()
