"""Counts requests over a rate limit (429): they are logged in one line, not as rows of the audit log."""

import logging
import time
from collections import Counter
from threading import Lock
from typing import Final

from backend.models.access.sources import network_of

log = logging.getLogger(__name__)

_INTERVAL_SECONDS: Final = 60.0
_MOST_SOURCES: Final = 1000
_OTHERS: Final = "others"


class LimitedRequests:
    """The counters, by network, which `report` logs and begins anew. May be used by many threads."""

    def __init__(self) -> None:
        # Guards _counts; never held across I/O.
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._reported_at = float("-inf")

    def count(self, source: str | None) -> None:
        """Count a request of a source."""
        name = "unix" if source is None else network_of(source)
        with self._lock:
            if name not in self._counts and len(self._counts) >= _MOST_SOURCES:
                name = _OTHERS
            self._counts[name] += 1

    def report_in_time(self) -> None:
        """Log what was counted, at once after a quiet minute and then once a minute."""
        now = time.monotonic()
        if self._counts and now - self._reported_at >= _INTERVAL_SECONDS:
            self._reported_at = now
            self.report()

    def report(self) -> None:
        """Log one line about what was counted since the last call, if anything was."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        ((most, number),) = counts.most_common(1)
        log.warning(
            "requests_limited",
            extra={"requests": counts.total(), "sources": len(counts), "most_from": most, "of_them": number},
        )
