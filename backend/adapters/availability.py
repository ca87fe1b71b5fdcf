"""Whether the database answers; the log says once that it went away, and once that it is back."""

import logging
from threading import Lock
from typing import Final

log = logging.getLogger(__name__)

_CONSEQUENCE: Final = "every change gets a 503, reads go on from memory"


class Availability:
    """What was last seen of a database by whichever thread used it."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._lock = Lock()  # guards _reason, so that each line is written once
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the database is known to be away, or None."""
        return self._reason

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
        if known is not None:
            log.info("database_back", extra={"database": self._database})
