"""Student processes for tests."""

from __future__ import annotations

from pathlib import Path

import minipaged
from minipaged.labs.student import Student

PACKAGE = Path(minipaged.__file__).parent


def student_of(folder: Path, source: str, **settings) -> Student:
    """Starts a student process that runs ``source``."""
    file = folder / "answer.py"
    file.write_text(source)
    return Student(file, **settings)
