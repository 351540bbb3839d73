"""Static batching, as in FasterTransformer: the batch ends with its longest request (PagedAttention paper, §6.1).

Adds ``batching="static"``. It is an admission policy (`core.seams.AdmissionPolicy`: ``eligible``, ``limits``). Read
`StaticBatching` first. The page shows it in any scenario of several requests, with *Settings* → batching.
"""

from __future__ import annotations

from minipaged.core.request import Request
from minipaged.core.seams import FCFS, Limits

BATCHINGS = ("continuous", "static")


class StaticBatching(FCFS):
    """Admits no request while any runs, and then all that the pool can hold at once."""

    def eligible(self, waiting: list[Request]) -> list[Request]:
        return [] if self.scheduler.running else waiting

    def limits(self, request: Request | None) -> Limits:
        # The next chance is far away, so a request joins even if this step has no token left for it.
        return super().limits(request)._replace(needs_tokens=False)
