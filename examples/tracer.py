"""A tracer: the engine's events as a Chrome trace, to look at in Perfetto (https://ui.perfetto.dev) or chrome://tracing.

    minipaged visualize --plugin examples/tracer.py      # writes trace.json when it ends
    LLM("tiny", subscribers=[Tracer("trace.json")])

Each request has a row (waiting, running, preempted), steps have a row of their own, and used blocks are a counter.
"""

import atexit
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

ENGINE, REQUESTS = 0, 1  # the two processes of the trace
BEGINS = {"request_added": "waiting", "admitted": "running", "resumed": "running", "preempted": "preempted"}


class Tracer:
    """Subscribes to an engine's events, and writes them to ``path`` when the program ends, or with `save`."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.trace = Path(path).resolve(), list[dict[str, Any]]()
        self.open: dict[str, str] = {}  # request → what it does now
        self.row: dict[str, int] = {}  # request → its row
        self.seqs: dict[int, str] = {}  # live sequence → its request
        self.tables: dict[int, list[int]] = {}  # sequence → its blocks
        self.start = time.perf_counter()
        atexit.register(self.save)

    def __call__(self, e: Any) -> None:  # a minipaged.events.Event
        if e.type in BEGINS:
            self.phase(e.request_id, BEGINS[e.type])
            self.seqs |= dict.fromkeys(getattr(e, "seq_ids", ()), e.request_id)
        elif e.type == "forked":
            self.seqs[e.child] = e.request_id
            if e.request_id not in self.open:  # a copy by `Engine.fork`
                self.phase(e.request_id, "running")
        elif e.type in ("allocated", "shared"):
            self.tables.setdefault(e.seq_id, []).append(e.block)
        elif e.type == "copied":
            self.tables[e.seq_id][e.logical] = e.dst
        elif e.type in ("freed", "swapped_out"):
            self.tables.pop(e.seq_id, None)
        elif e.type == "swapped_in":
            self.tables[e.seq_id] = list(e.blocks)
        elif e.type == "speculated" and e.blocks:
            del self.tables[e.seq_id][-len(e.blocks) :]
        elif e.type == "finished":
            if (request_id := self.seqs.pop(e.seq_id)) not in self.seqs.values():
                self.phase(request_id, None)
        elif e.type == "step_started":
            self.add("B", f"step {e.step}", ENGINE)
        elif e.type == "step_finished":
            self.add("E", f"step {e.step}", ENGINE, args={"tokens": e.num_tokens})
            owners = Counter(block for table in self.tables.values() for block in table)
            shared = sum(count > 1 for count in owners.values())
            self.add("C", "blocks", ENGINE, args={"used once": len(owners) - shared, "shared": shared})

    def phase(self, request_id: str, name: str | None) -> None:
        """The request ends what it does now, and begins something else."""
        row, now = self.row.setdefault(request_id, len(self.row)), self.open.pop(request_id, None)
        if now is not None:
            self.add("E", now, REQUESTS, row)
        if name is not None:
            self.open[request_id] = name
            self.add("B", name, REQUESTS, row, args={"request": request_id})

    def add(self, kind: str, name: str, pid: int, tid: int = 0, **more: Any) -> None:
        now = (time.perf_counter() - self.start) * 1e6  # microseconds
        self.trace.append({"ph": kind, "name": name, "ts": now, "pid": pid, "tid": tid} | more)

    def save(self) -> None:
        self.path.write_text(json.dumps({"traceEvents": self.trace}), encoding="utf-8")


SETTINGS = {"subscribers": [Tracer("trace.json")]}
