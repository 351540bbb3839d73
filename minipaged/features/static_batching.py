"""Static batching, as in FasterTransformer: a batch runs until its longest request ends (PagedAttention paper, §6.1).

Adds ``batching="static"``. It is an admission policy (`core.seams.AdmissionPolicy`: ``eligible``, ``limits``). Read
`StaticBatching` first. The page shows it in any scenario of several requests, with *Settings* → batching.
"""

from __future__ import annotations

from minipaged.core.request import Request
from minipaged.core.seams import FCFS, Limits

BATCHINGS = ("continuous", "static")


class StaticBatching(FCFS):
    """Admits no request while any runs, and then as many as the pool can hold."""

    def eligible(self, waiting: list[Request]) -> list[Request]:
        return [] if self.scheduler.running else waiting

    def limits(self, request: Request | None) -> Limits:
        # The next admission is far away, so a request is admitted even if this step's token budget is used up.
        return super().limits(request)._replace(needs_tokens=False)
