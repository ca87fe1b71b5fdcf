"""Deletes what the audit log no longer has to keep, some rows at a time."""

import time
from datetime import UTC, datetime, timedelta
from typing import Final

from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.services.ports import AccessStore

KEPT: Final = timedelta(days=365)
# A step's transaction takes some 10 ms, for which nothing else is written.
ROWS_AT_A_TIME: Final = 1000
# Each time that something is pruned adds a row, so it isn't done for every few rows that grow old.
_INTERVAL_SECONDS: Final = 3600.0


class AuditPruning:
    """Prunes once an hour, and step by step for as long as there is more."""

    def __init__(self, store: AccessStore, keep: timedelta = KEPT) -> None:
        self._store = store
        self._keep = keep
        self._next_at = float("-inf")

    def step(self) -> None:
        """Delete some rows, if it is time to and any are old enough; raise RecordsUnavailableError."""
        if time.monotonic() < self._next_at:
            return
        now = datetime.now(UTC)
        event = SERVICE.event(now, AuditAction.AUDIT_PRUNED, AuditOutcome.NOTED)
        if self._store.prune_audit(now - self._keep, ROWS_AT_A_TIME, event) < ROWS_AT_A_TIME:
            self._next_at = time.monotonic() + _INTERVAL_SECONDS
