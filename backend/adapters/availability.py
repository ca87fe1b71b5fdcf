"""Whether the database answers; the log says once that it went away, and once that it is back."""

import logging
import time
from threading import Lock
from typing import Final

log = logging.getLogger(__name__)

_SETTLED_SECONDS: Final = 10.0
_CONSEQUENCE: Final = "every change gets a 503, reads go on from memory"


class Availability:
    """What was last seen of a database by whichever thread used it."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._lock = Lock()  # guards _reason, so that each line is written once
        self._reason: str | None = None
        self._found_at = float("-inf")

    @property
    def reason(self) -> str | None:
        """Why the database is known to be away, or None."""
        return self._reason

    @property
    def found_at(self) -> float:
        """When it was found again, by time.monotonic()."""
        return self._found_at

    def is_settled(self) -> bool:
        """Say whether the database answers, and so for some time: who had it open has noticed by then."""
        return self._reason is None and time.monotonic() - self._found_at > _SETTLED_SECONDS

    def lost(self, reason: str) -> None:
        """Note that the database is away."""
        with self._lock:
            known, self._reason = self._reason, reason
        if known is None:
            log.error(
                "database_away",
                extra={"database": self._database, "reason": reason, "consequence": _CONSEQUENCE},
            )

    def found(self) -> None:
        """Note that the database answers."""
        if self._reason is None:
            return
        with self._lock:
            known, self._reason = self._reason, None
            self._found_at = time.monotonic()
        if known is not None:
            log.info("database_back", extra={"database": self._database})
