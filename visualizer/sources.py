"""Maps each event type to the engine function that causes it: name, file and lines, read from the running code.

The page contains these files, so that a link opens the code without network access, and in the running version.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import minipaged
from minipaged.core.block_table import BlockTables
from minipaged.core.engine import Engine
from minipaged.core.prefix_cache import PrefixCache
from minipaged.core.scheduler import Scheduler
from minipaged.events.waste import AHEAD
from minipaged.features.batchllm.groups import Groups
from minipaged.features.contiguous.contiguous_tables import ContiguousTables
from minipaged.features.eviction.predictions import Predictions
from minipaged.features.speculative.drafts import Speculation
from minipaged.features.swap.swap_stage import Swap
from minipaged.features.swap.swap_tables import SwapTables
from minipaged.features.vattention.virtual_tables import VirtualTables

ROOT = Path(minipaged.__file__).resolve().parent.parent

# Keyed by event type. Blocks shared through the prefix cache come from another function than those shared by a fork.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "request_added": Engine.add_request,
    "step_started": Engine.step,
    "admitted": Scheduler.admit,
    "allocated": BlockTables.reserve,
    "shared": BlockTables.fork,
    "shared_prefix": BlockTables.open,
    "copied": BlockTables.reserve,
    "scheduled": Scheduler.schedule,
    "preempted": Scheduler.preempt,
    "swapped_out": SwapTables.swap_out,
    "swapped_in": SwapTables.swap_in,
    "resumed": Swap.before_admission,
    "filled": Scheduler.commit,
    "cached": PrefixCache.insert,
    "evicted": PrefixCache.evict,
    "predicted": Predictions.releasing,
    "forked": BlockTables.fork,
    "sampled": Scheduler.take,
    "proposed": Speculation.planned,
    "speculated": Speculation.sampled,
    "freed": BlockTables.free,
    "finished": Scheduler.finish,
    "group_started": Groups.group,
    "prefix_kept": Groups.keep,
    "prefix_released": Groups.release,
    "group_ended": Groups.finished,
    "step_finished": Engine.step,
    "engine_error": Engine.give_up,
    "engine_started": Engine.started_event,
}

# Functions of the memory managers that replace those of the paged one.
_CONTIGUOUS: dict[str, Callable[..., Any]] = {
    "allocated": ContiguousTables.own,
    "shared": ContiguousTables.fork,
    "copied": ContiguousTables.move,
    "forked": ContiguousTables.fork,
    "freed": ContiguousTables.free,
}
_VIRTUAL: dict[str, Callable[..., Any]] = {
    "allocated": VirtualTables.reserve,
    "shared_prefix": VirtualTables.open,
    "copied": VirtualTables.reserve,
}
OF_MANAGER: dict[str, dict[str, Callable[..., Any]]] = dict.fromkeys(AHEAD, _CONTIGUOUS) | {"vattention": _VIRTUAL}


@cache
def sources() -> dict[str, Any]:
    """Functions by event type, and the text of their source files, as JSON-compatible objects for the page.

    ``{"functions": {event type: {"name", "file", "line", "last", "url"}}, "managers": {memory manager: {event type:
    …}}, "files": {file: text}}``. ``line`` is the line with ``def``; ``url`` is ``None`` without a project URL.
    """
    functions = {kind: _describe(function) for kind, function in FUNCTIONS.items()}
    managers = {
        memory: {kind: _describe(function) for kind, function in own.items()} for memory, own in OF_MANAGER.items()
    }
    described = [*functions.values(), *(one for own in managers.values() for one in own.values())]
    files = sorted({one["file"] for one in described})
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in files}
    return {"functions": functions, "managers": managers, "files": texts}


def _describe(function: Callable[..., Any]) -> dict[str, Any]:
    lines, first = inspect.getsourcelines(function)
    file = Path(inspect.getsourcefile(function) or "").resolve().relative_to(ROOT).as_posix()
    line = first + next(i for i, words in enumerate(lines) if words.lstrip().startswith("def "))
    home = _project_url()
    return {
        "name": function.__qualname__,
        "file": file,
        "line": line,
        "last": first + len(lines) - 1,
        "url": f"{home}/blob/main/{file}#L{line}" if home else None,
    }


@cache
def _project_url() -> str | None:
    """The GitHub address in the package's metadata (pyproject's ``[project.urls]``), if it names one."""
    try:
        urls = metadata("minipaged").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    for entry in urls:
        found = re.fullmatch(r"(https://github\.com/[\w.-]+/[\w.-]+?)(\.git|/)?", entry.partition(",")[2].strip())
        if found:
            return found[1]
    return None
