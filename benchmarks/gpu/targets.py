"""Compares measurements with their targets, and prints the report's tables."""

from __future__ import annotations

from typing import Any

DECODE, ROOFLINE, BATCHING = 0.85, 0.70, 3.0
LARGE = 2**18  # tokens of KV in a large cell of the decode benchmark, or more: 1 GiB in one layer


def judge(sections: dict[str, dict[str, Any]], smoke: bool) -> list[dict[str, Any]]:
    """Each target with its measurement; ``met`` is ``None`` without one, as in smoke runs."""
    large = [cell for cell in _cells(sections, "decode") if cell["batch"] * cell["context"] >= LARGE]
    decode = [cell["fraction_of_copy"] for cell in large]
    end = _cells(sections, "end_to_end")
    single = {cell["model"]: cell["fraction_of_roofline"] for cell in end if cell["batch"] == 1}
    crowd = {cell["model"]: cell["times_continuous_batching"] for cell in end if cell["batch"] == 256}
    targets = [
        ("decode kernel, fraction of copy bandwidth, worst of the cells of 2^18 tokens or more", DECODE, decode),
        *((f"{model}, batch 1, fraction of the roofline", ROOFLINE, [found]) for model, found in single.items()),
        *((f"{model}, batch 256, times transformers' continuous batching", BATCHING, [found])
          for model, found in crowd.items()),
    ]  # fmt: skip
    return [_target(name, wanted, found, smoke) for name, wanted, found in targets]


def _cells(sections: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [cell for cell in sections.get(name, {}).get("results", {}).get("cells", []) if "skipped" not in cell]


def _target(name: str, wanted: float, found: list[float | None], smoke: bool) -> dict[str, Any]:
    numbers = [number for number in found if number is not None]
    # A cell without a number neither meets nor misses the target.
    measured = min(numbers) if numbers and len(numbers) == len(found) else None
    return {
        "target": name,
        "wanted": wanted,
        "measured": measured,
        "met": None if smoke or measured is None else measured >= wanted,
    }


def print_report(result: dict[str, Any]) -> None:
    """Prints the measurements, sections and targets as tables that fit a terminal."""
    machine, sections = result["machine"], result["sections"]
    print(f"\n{machine.get('gpu', 'CPU')}, driver {machine.get('driver')}, {machine.get('versions')}")
    if result["smoke"]:
        print("A smoke run: its numbers say nothing.")
    copy = sections.get("decode", {}).get("results", {}).get("copy_bytes_per_second", {}).get("median")
    if copy:
        print(f"\nDecode, GB/s of keys and values (a copy: {copy / 1e9:.0f} GB/s, read and written)")
        names = ("paged", "sdpa", "sdpa_gqa", "flashinfer")
        _table(
            ["batch", "context", *names, "of copy"],
            [[c["batch"], c["context"], *(_rate(c, f"{name}_bytes_per_second", 1e9) for name in names),
              _number(c["fraction_of_copy"])] for c in _cells(sections, "decode")],
        )  # fmt: skip
        flex = sections["decode"]["results"].get("flex", [])
        _table(["batch", "context", "flex"],
               [[c["batch"], c["context"], _rate(c, "flex_bytes_per_second", 1e9)] for c in flex])  # fmt: skip
    if cells := _cells(sections, "prefill"):
        print("\nPrefill, TFLOP/s")
        _table(["", "paged", "sdpa"],
               [[c["name"], _rate(c, "paged_flops", 1e12), _rate(c, "sdpa_flops", 1e12)] for c in cells])  # fmt: skip
    if cells := _cells(sections, "end_to_end"):
        print("\nEnd to end, tokens/s")
        names = ("minipaged", "generate", "continuous_batching")
        _table(
            ["model", "batch", *names, "roofline", "of roofline"],
            [[c["model"], c["batch"], *(_rate(c, f"{name}_tokens_per_second", 1) for name in names),
              f"{c['roofline']:.0f}", _number(c["fraction_of_roofline"])] for c in cells],
        )  # fmt: skip
    print("\nSections")
    _table(["", "status", "seconds", ""], [
        [name, section["status"], section.get("seconds", ""),
         section.get("reason") or section["results"].get("not_run") or "; ".join(section.get("failures", []))[:300]]
        for name, section in sections.items()
    ])  # fmt: skip
    print("\nTargets")
    verdict = {True: "met", False: "MISSED", None: "not judged"}
    _table(["", "wanted", "measured", ""], [
        [target["target"], target["wanted"], _number(target["measured"]), verdict[target["met"]]]
        for target in result["targets"]
    ])  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _rate(cell: dict[str, Any], name: str, unit: float) -> str:
    """Median ± half of the range of the measurements."""
    found = cell.get(name)
    if not found or "error" in found:
        return "error" if found else "–"
    return f"{found['median'] / unit:.4g} ±{(found['max'] - found['min']) / 2 / unit:.2g}"


def _table(head: list[str], rows: list[list[Any]]) -> None:
    if not rows:
        return
    lines = [head, *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  " + "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
