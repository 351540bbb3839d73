"""The teacher's page on a class: one HTML file without scripts. Whatever students wrote is escaped, and cannot load."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from minipaged.labs.lab import Lab
from visualizer.styles import MONO, SANS, font_faces, inline

if TYPE_CHECKING:
    from minipaged.labs.grade import Row

MOST = 10  # causes that the page lists
MAX_BINS = 11  # of the histogram
MARKS = {"pass": "✓", "fail": "✗", "blocked": "·", "limit": "T", "import": "!", "skip": "-"}
LEGEND = "✓ passed, ✗ failed, · blocked by another task, T time or memory limit, ! no file that can be imported"
STYLE = """
:root { color-scheme: light dark }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin-bottom: 2rem } th, td { padding: .2rem .8rem; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } tbody tr { border-top: 1px solid #8884 }
td.bar { width: 24rem } td.bar div { background: #3b7dd8; height: 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere } td { overflow-wrap: anywhere; vertical-align: top }
"""


def page(lab: Lab, rows: Sequence[Row]) -> str:
    """The whole page: histogram, pass rates, frequent causes, and every student."""
    title = f"{lab.key} {lab.title}"
    points = sorted(row.points for row in rows)
    middle = (points[(len(points) - 1) // 2] + points[len(points) // 2]) / 2
    policy = "default-src 'none'; style-src 'unsafe-inline'; font-src data:"
    fonts = font_faces(inline) + f"body {{ font: 16px/1.5 {', '.join(SANS)} }} pre {{ font-family: {', '.join(MONO)} }}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{fonts}{STYLE}</style>',
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(rows)} submissions, {lab.points} points to be had. Mean {sum(points) / len(points):.1f}, "
        f"median {middle:g}, all points: {points.count(lab.points)}.</p>",
        "<h2>Points</h2>",
        _bars(("points", "students"), histogram(points, lab.points)),
        "<h2>Tasks</h2>",
        _bars(("task", "passed"), [(f"{t.key} {t.title}", passed(rows, t.key)) for t in lab.tasks], len(rows)),
        "<h2>Most frequent causes</h2>",
        _table(("students", "cause", "for example"), map(_cause, causes(rows))),
        f"<h2>Students</h2><p>{LEGEND}.</p>",
        _table(("student", "points", *(task.key for task in lab.tasks), "cause"), (_student(lab, r) for r in rows)),
    ]
    return "\n".join(parts).encode("utf-8", "replace").decode() + "\n</html>\n"


def histogram(points: Sequence[int], most: int) -> list[tuple[str, int]]:
    """(points, students) from 0 to ``most``; ranges of points if there would be too many bars."""
    width = -(-(most + 1) // MAX_BINS)
    starts = range(0, most + 1, width)
    counts = Counter(value // width for value in points)
    ranges = ((start, min(start + width - 1, most)) for start in starts)
    return [(f"{a}" if a == b else f"{a}–{b}", counts[a // width]) for a, b in ranges]


def passed(rows: Sequence[Row], task: str) -> int:
    return sum(result.task == task and result.status == "pass" for row in rows for result in row.results)


def causes(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """The most frequent causes with the students who met them. Numbers in them depend on seeds, and do not count."""
    met: dict[str, tuple[str, list[str]]] = {}
    for row in rows:
        own = {result.cause for result in row.results if result.status not in ("pass", "blocked", "skip")}
        for kind, cause in {re.sub(r"-?\d+(\.\d+)?", "…", cause): cause for cause in sorted(own)}.items():
            met.setdefault(kind, (cause, []))[1].append(row.student)
    return sorted(met.values(), key=lambda item: (-len(item[1]), item[0]))[:MOST]


def _cause(met: tuple[str, list[str]]) -> list[str]:
    cause, students = met
    return [_number(len(students)), _text(cause), _text(students[0])]


def _student(lab: Lab, row: Row) -> list[str]:
    done = {result.task: result for result in row.results}
    marks = [f"<td>{MARKS[done[task.key].status] if task.key in done else '?'}</td>" for task in lab.tasks]
    first = next((result for result in row.results if result.status != "pass"), None)
    details = "\n".join((*first.trace, first.output)).strip() if first else ""
    cause = _text(row.cause)
    if details:
        summary = f"<summary>{escape(row.cause)}</summary>"
        cause = f"<td><details>{summary}<pre>{escape(details)}</pre></details></td>"
    return [_text(row.student), _number(row.points), *marks, cause]


def _bars(heads: tuple[str, str], bars: Sequence[tuple[str, int]], most: int = 0) -> str:
    """A bar for each count; with ``most``, the count as a share of it."""
    longest = most or max(count for _, count in bars)
    lines = ([_text(name), _number(count), _bar(count / longest), _text(_percent(count, most))] for name, count in bars)
    return _table((*heads, "", ""), lines)


def _percent(count: int, most: int) -> str:
    return f"{100 * count / most:.0f} %" if most else ""


def _table(heads: Iterable[str], lines: Iterable[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _bar(share: float) -> str:
    return f'<td class="bar"><div style="width:{100 * share:.0f}%"></div></td>'


def _text(text: str) -> str:
    return f"<td><bdi>{escape(text)}</bdi></td>"


def _number(number: int) -> str:
    return f'<td class="n">{number}</td>'
