"""Sections that go well, badly and very badly. Nothing here takes long to import."""

from __future__ import annotations

import ctypes
import sys
import time


def fine(job):
    job.note(answer=42)


def raises(job):
    job.note(answer=41)
    raise ValueError("seven is not eight")


def disappoints(job):
    job.fail("a kernel is wrong")
    job.note(answer=40)


def dies(job):
    job.note(answer=39)
    ctypes.string_at(0)  # as a process does that is killed for its memory, or whose driver crashes


def hangs(job):
    job.note(answer=38)
    time.sleep(600)


def exits(job):
    sys.exit(3)
