"""Builds the README's table of measurements from the committed results.

python -m minipaged.experiments.readme            # prints the table
python -m minipaged.experiments.readme --write    # puts it between the markers in README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from minipaged.experiments import Result
from minipaged.experiments.result_text import machine_text, number_text, paper_text

RESULTS = Path("benchmarks/results/experiments")
SELECTED = {  # experiment: {title in the table: name of the row in the result}
    "batch-size": {f"requests at once, {s}": s for s in ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "paged")},
    "waste": {
        "slots of the pool that hold a token, Orca (Max)": "Orca (Max): token",
        "the same, Orca (Pow2)": "Orca (Pow2): token",
        "the same, Orca (Oracle)": "Orca (Oracle): token",
        "the same, paged": "paged: token",
    },
    "latency": {
        f"sustained request rate, {row}": row
        for row in ("paged / FasterTransformer", "paged / Orca (Max)", "paged / Orca (Oracle)")
    },
    "throughput": {
        f"real engine, embedded model, throughput, {row}": row
        for row in ("paged / FasterTransformer", "paged / Orca (Max)", "paged / Orca (Oracle)")
    },
    "parallel-sampling": {
        f"memory saved, {n} samples, {data}": f"{data}, n = {n}"
        for data in ("Alpaca-like", "ShareGPT-like")
        for n in (2, 6)
    },
    "beam-search": {
        f"memory saved, {n} beams, {data}": f"{data}, {n} beams"
        for data in ("Alpaca-like", "ShareGPT-like")
        for n in (2, 6)
    },
    "shared-prefix": {
        f"throughput, {n} tokens shared, paged / Orca (Oracle)": f"prefix of {n} tokens, shared / Orca (Oracle)"
        for n in (80, 341)
    },
    "chatbot": {"sustained request rate, chats, paged / Orca (Oracle)": "paged / Orca (Oracle)"},
    "kernel-overhead": {
        "paged attention, overhead (batch 32, context 256)": "overhead of paged attention, batch 32, context 256"
    },
}


def table(directory: Path = RESULTS) -> str:
    """A Markdown table of the paper's numbers and ours, with the reasons for differences below it."""
    lines = ["| | paper | here |", "| --- | --- | --- |"]
    reasons: list[str] = []
    for name, selected in SELECTED.items():
        result = Result.from_json((directory / f"{name}.json").read_text(encoding="utf-8"))
        for title, what in selected.items():
            row = result.row(what)
            if row.why and row.why not in reasons:
                reasons.append(row.why)
            mark = f" <sup>{reasons.index(row.why) + 1}</sup>" if row.why else ""
            lines.append(f"| {title} | {paper_text(row)} | {number_text(row)}{mark} |")
    lines += ["", "Why they differ:", ""]
    lines += [f"{number}. {why[0].upper()}{why[1:]}." for number, why in enumerate(reasons, start=1)]
    lines += [
        "",
        "\\* from a secondary source; the other numbers are from the paper itself. Beams, the real engine and",
    ]
    lines += [f"attention were measured with the embedded model or the kernels on {machine_text(result)}; the rest is"]
    lines += ["simulated."]
    return "\n".join(lines)


def with_table(text: str, new: str, name: str) -> str:
    """Replaces what is between the markers of this name in ``text``. Raises `ValueError` if they are missing."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"the text has no markers {first} … {last}")
    return f"{before}{first}\n{new}\n{last}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = Path("README.md")
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), table(), "experiments"), encoding="utf-8")
    else:
        print(table())
