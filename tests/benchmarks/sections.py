"""Sections that succeed, fail and crash, for tests of the GPU check. They import only fast modules."""

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
    ctypes.string_at(0)  # a crash, like that of a driver or for lack of memory


def hangs(job):
    job.note(answer=38)
    time.sleep(600)


def exits(job):
    sys.exit(3)
