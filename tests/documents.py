"""The commands and code of the documents: found here, run by ``tests/test_documents.py``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "tutorials/README.md",
    "tutorials/INSTRUCTORS.md",
    "minipaged/labs/README.md",
    "minipaged/tiny/README.md",
]
PROGRAMS = ("minipaged", "make", "python", "python3", "pip", "torchrun", "pytest", ".ci/run")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.S | re.M)


class Block(NamedTuple):
    """A fenced block of a document. ``place``: file and line, for messages."""

    place: str
    language: str
    text: str


class Command(NamedTuple):
    """A command of a document, as it is written. ``place``: the document, and the line of its block if it has one."""

    place: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words up to a redirection or a further command, as a shell reads them."""
        words = shlex.split(self.text, comments=True)
        return words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))]


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(f"{document}:{text.count(chr(10), 0, found.start()) + 1}", found[2], found[3])
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a block, if it is one for a shell."""
    if block.language not in ("", "sh", "bash"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    return [Command(block.place, line.strip()) for line in lines if line.split()[:1] and line.split()[0] in PROGRAMS]


def named_in_sentences(document: str) -> list[Command]:
    """The commands that a document's sentences name in full: with no placeholder such as FILE or …"""
    prose = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [span for span in spans if span.startswith(tuple(f"{program} " for program in PROGRAMS))]
    return [Command(document, span) for span in found if not re.search(r"…|(?<![\w$])[A-Z]{3,}(?![\w=])", span)]
