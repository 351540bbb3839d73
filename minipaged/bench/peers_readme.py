"""Makes the README's table that compares engines, from the committed result.

python -m minipaged.bench.peers_readme            # prints the table
python -m minipaged.bench.peers_readme --write    # puts it between the markers in README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from minipaged.experiments.readme import with_table

RESULT = Path("benchmarks/results/peers.json")


def table(path: Path = RESULT) -> str:
    """Markdown table: tokens per second, in brackets how many times as fast minipaged is, and below it the setup."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    result = measured["result"]
    engines = list(result["engines"])
    lines = ["| model | requests | " + " | ".join(engines) + " |", "| --- | --- |" + " --- |" * len(engines)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        rows.setdefault((f"{row['model']}, {row['dtype']}", row["cell"]), {})[row["engine"]] = row
    for (model, cell), found in rows.items():
        cells = [_cell(found[engine]) if engine in found else "" for engine in engines]
        lines.append(f"| {model} | {cell} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in result["engines"].items() if name != "minipaged")
    about = measured["machine"]
    cpu = f"{about['cores']} cores of an {about['cpu']}"
    lines += [
        "",
        f"Tokens a second, the median of {result['repeats']} rounds in which the engines took turns; in brackets how",
        f"many times as fast minipaged was. {cpu}, torch {about['torch']}, {versions}.",
        f"Random weights, greedy; `{measured['command']}`.",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    speed = f"{row['median']:,.0f}"
    return speed if row["engine"] == "minipaged" else f"{speed} ({row['ratio']:.1f} ×)"


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = Path("README.md")
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), table(), "peers"), encoding="utf-8")
    else:
        print(table())
