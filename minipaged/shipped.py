"""Finds what lies beside the packages: tutorials, examples, results of the experiments.

In a clone they are folders of the repository; a wheel puts them under ``share/minipaged`` of the environment.
"""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path

import minipaged
from minipaged.errors import InvalidRequest

PACKAGES = Path(minipaged.__file__).resolve().parent.parent
RESULTS = "benchmarks/results/experiments"
_LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def folder(name: str) -> Path | None:
    """A folder of the repository, such as ``tutorials``; ``None`` if this installation lacks it."""
    if (PACKAGES / "pyproject.toml").is_file():
        clone = PACKAGES / name
        return clone if clone.is_dir() else None
    try:
        files = metadata.files("minipaged") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        before, found, _ = Path(str(file.locate())).resolve().as_posix().rpartition(f"share/minipaged/{name}/")
        if found and Path(before + found).is_dir():
            return Path(before + found)
    beside = PACKAGES / "share" / "minipaged" / name  # where pip --target puts it, whatever the list of files says
    return beside if beside.is_dir() else None


def copy_tutorials(to: Path) -> None:
    """Copies the tutorials to a new folder; links to the engine's files lead to the installed ones.

    Raises `InvalidRequest` if this installation has no tutorials, or the folder cannot be written or is not empty.
    """
    tutorials = folder("tutorials")
    if tutorials is None:
        raise InvalidRequest(
            "this installation has no tutorials; they are in a clone of the repository, and in the wheel"
        )
    try:
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise InvalidRequest(f"{to} is there already; give another folder, or delete it")
        shutil.copytree(tutorials, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
        for file in [*to.glob("*.md"), *to.glob("[0-9]*.py")]:
            file.write_text(_LINK.sub(_led_home, file.read_text(encoding="utf-8")), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"the tutorials cannot be written: {error}") from error


def _led_home(link: re.Match[str]) -> str:
    target = PACKAGES / link[2]
    return f"[{link[1]}]({target.as_posix()})" if target.exists() else link[1]
