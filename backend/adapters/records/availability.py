"""Remembers whether the database can be read or written, and logs each outage and each recovery once."""

import logging
import time
from threading import Lock
from typing import Final

log = logging.getLogger(__name__)

_SETTLED_SECONDS: Final = 10.0
_CONSEQUENCE: Final = "every change gets a 503, reads go on from memory"


class Availability:
    """The state that the last use of the database found, in any thread."""

    def __init__(self, database: str, lost: str = "database_away", found: str = "database_back") -> None:
        """Begin with a database that is there. `lost` and `found` are the events in the log."""
        self._database = database
        self._events = lost, found
        self._lock = Lock()  # guards `reason`, so that each line is written once
        # Why it is known not to, or None.
        self.reason: str | None = None
        # When it was found again, by time.monotonic().
        self.found_at = float("-inf")

    def is_settled(self) -> bool:
        """Say whether the database has answered for ten seconds, so that every connection has noticed."""
        return self.reason is None and time.monotonic() - self.found_at > _SETTLED_SECONDS

    def lost(self, reason: str) -> None:
        """Note that it doesn't, and why."""
        with self._lock:
            known, self.reason = self.reason, reason
        if known is None:
            log.error(
                self._events[0],
                extra={"database": self._database, "reason": reason, "consequence": _CONSEQUENCE},
            )

    def found(self) -> None:
        """Note that it does."""
        if self.reason is None:
            return
        with self._lock:
            known, self.reason = self.reason, None
            self.found_at = time.monotonic()
        if known is not None:
            log.info(self._events[1], extra={"database": self._database})
