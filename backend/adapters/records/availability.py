"""Whether the database answers, or can be written: the log says once that it can't, and once that it can."""

import logging
import time
from threading import Lock
from typing import Final

log = logging.getLogger(__name__)

_SETTLED_SECONDS: Final = 10.0
_CONSEQUENCE: Final = "every change gets a 503, reads go on from memory"


class Availability:
    """What was last seen of it by whichever thread used the database."""

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
        """Say whether the database answers, and so for some time: who had it open has noticed by then."""
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
