"""Formats a result's numbers, machine and versions as text, for the terminal, the page and the README."""

from __future__ import annotations

from minipaged.experiments.result import SECONDARY, Result, Row


def number_text(row: Row) -> str:
    """Our number with its spread and unit, to three digits."""
    spread = f" ({_short(row.spread[0])} to {_short(row.spread[1])})" if row.spread else ""
    return f"{_short(row.ours)}{spread} {row.unit}".rstrip()


def paper_text(row: Row) -> str:
    """The paper's number; a star, escaped for Markdown, marks a secondary source."""
    if row.paper is None:
        return "–"
    return row.paper + (r"\*" if row.source == SECONDARY else "")


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def machine_text(result: Result) -> str:
    """The machine, the versions and the date of a result."""
    m = result.machine
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}, Python {m['python']}, "
        f"torch {m['torch']}, {m['date']}"
    )
