"""What students handed in: one file, folder or ZIP each. Nothing is unpacked to disk, and nothing is believed."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MAX_SOURCE = 1 << 20  # bytes of the file to grade
MAX_ARCHIVE = 10 << 20  # bytes of a ZIP, packed
MAX_ENTRIES = 1000  # files in a ZIP or a folder
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Unusable(Exception):
    """There is no file to grade. The text says why, as the end of a sentence about the submission."""


class Submission(NamedTuple):
    """A student's source, or the ``problem`` that there is none."""

    student: str
    source: bytes
    problem: str = ""


def collect(folder: Path, wanted: str) -> list[Submission]:
    """One for each student, by name. A student is called as the file, folder or ZIP is, without ``.py`` or ``.zip``.

    Hidden entries, and those that macOS adds to archives, are left out. ``wanted`` is the name of the file to grade;
    a single file may have any.
    """
    entries: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not _is_litter(path.name):
            entries.setdefault(_student(path), []).append(path)
    return [_read(student, paths, wanted) for student, paths in sorted(entries.items())]


def _student(path: Path) -> str:
    stem = path.stem if path.suffix.lower() in (".py", ".zip") and not path.is_dir() else path.name
    return os.fsencode(stem).decode("utf-8", "ignore").strip(". ") or "unnamed"


def _read(student: str, paths: list[Path], wanted: str) -> Submission:
    try:
        if len(paths) > 1:
            raise Unusable(f"there are {len(paths)} submissions: {', '.join(path.name for path in paths)}")
        source = _of_entry(paths[0], wanted)
        if b"\0" in source:
            raise Unusable("the file is binary, not Python source")
        source.decode("utf-8")
    except Unusable as error:
        return Submission(student, b"", str(error))
    except UnicodeDecodeError as error:
        return Submission(student, b"", f"the file is not text in UTF-8 ({error.reason} at byte {error.start})")
    except OSError as error:
        return Submission(student, b"", f"the submission cannot be read: {error.strerror or error}")
    return Submission(student, source)


def _of_entry(path: Path, wanted: str) -> bytes:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        return _of_folder(path, wanted)
    if not stat.S_ISREG(mode):
        raise Unusable(f"{path.name} is {'a symbolic link' if stat.S_ISLNK(mode) else 'no ordinary file'}")
    if path.suffix.lower() == ".zip":
        return _of_zip(path, wanted)
    if path.suffix.lower() != ".py":
        raise Unusable(f"{path.name} is neither a folder, a .zip nor a .py file")
    return _of_file(path)


def _of_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return _bounded(file.read(MAX_SOURCE + 1), path.name)


def _of_folder(folder: Path, wanted: str) -> bytes:
    """The file below ``folder``, links not followed; or that in the only ZIP there is, as course systems store them."""
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_litter(name)]
        names += [os.path.relpath(os.path.join(place, name), folder) for name in files]
        if len(names) > MAX_ENTRIES:
            raise Unusable(f"the folder has more than {MAX_ENTRIES} files")
    zips = [name for name in names if name.lower().endswith(".zip") and not _is_litter(Path(name).name)]
    if len(zips) == 1 and not any(Path(name).name == wanted for name in names):
        return _of_entry(folder / zips[0], wanted)
    return _of_entry(folder / _choose(names, wanted), wanted)


def _of_zip(path: Path, wanted: str) -> bytes:
    """Reads one entry, and no more of it than a source may have: a bomb is not set off."""
    if path.stat().st_size > MAX_ARCHIVE:
        raise Unusable(f"the ZIP has more than {MAX_ARCHIVE >> 20} MB")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {str(PurePosixPath(entry.filename)): entry for entry in archive.infolist()}
            for entry in entries.values():
                _refuse_escape(entry)
            if len(entries) > MAX_ENTRIES:
                raise Unusable(f"the ZIP has more than {MAX_ENTRIES} files")
            entry = entries[_choose(entries, wanted)]
            if entry.flag_bits & 1 or entry.compress_type not in METHODS:
                raise Unusable("the ZIP is encrypted, or packed in an unusual way")
            with archive.open(entry) as file:
                return _bounded(file.read(MAX_SOURCE + 1), wanted)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise Unusable(f"the ZIP cannot be read: {error}") from None


def _refuse_escape(entry: zipfile.ZipInfo) -> None:
    name = entry.filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]:
        raise Unusable(f"the ZIP has an entry outside of its folder: {entry.filename!r}")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise Unusable(f"the ZIP has a symbolic link: {entry.filename!r}")


def _choose(names: Iterable[str], wanted: str) -> str:
    """The path that ends in ``wanted``, the least deep one if there are several."""
    paths = [PurePosixPath(name) for name in names]
    found = [path for path in paths if path.name == wanted and not any(map(_is_litter, path.parts))]
    depth = min((len(path.parts) for path in found), default=0)
    best = [str(path) for path in found if len(path.parts) == depth]
    if not best:
        raise Unusable(f"there is no {wanted} in it")
    if len(best) > 1:
        raise Unusable(f"there are {len(best)} files called {wanted}: {', '.join(best[:3])}")
    return best[0]


def _bounded(source: bytes, name: str) -> bytes:
    if len(source) > MAX_SOURCE:
        raise Unusable(f"{name} has more than {MAX_SOURCE >> 20} MB")
    return source


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
