"""How files are named: one name for one idea, so that a name leads to one file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = ("minipaged", "visualizer", "benchmarks", "tutorials")
OFTEN = ("__init__.py", "__main__.py", "conftest.py")  # Python and pytest ask for these names
KNOWN = {("minipaged/build.py", "tutorials/build.py")}  # one puts engines together, the other makes pages


def shared_names(*folders: str) -> set[tuple[str, ...]]:
    """The paths of the files that share a name. The labs' folders are left out: all of them have the same files."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT)
            if path.name not in OFTEN and not path.match("minipaged/labs/a[0-9]/*"):
                by_name[path.name].append(path.as_posix())
    return {tuple(sorted(paths)) for paths in by_name.values() if len(paths) > 1}


def test_no_two_files_share_a_name():
    assert sorted((shared_names(*CODE) | shared_names("tests")) - KNOWN) == []
