"""Deletes rows of the audit log that are kept long enough, some at a time."""

from datetime import UTC, datetime, timedelta
from typing import Final

from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.services.ports import AccessStore

# The transaction takes some 10 ms, for which nothing else is written.
ROWS_AT_A_TIME: Final = 1000


def prune_audit(store: AccessStore, keep: timedelta) -> bool:
    """Delete rows older than `keep`; return whether more may be left. Raises RecordsUnavailableError.

    Each time that rows are deleted one is added, so it isn't done for every few rows that grow old.
    """
    now = datetime.now(UTC)
    event = SERVICE.event(now, AuditAction.AUDIT_PRUNED, AuditOutcome.NOTED)
    return store.prune_audit(now - keep, ROWS_AT_A_TIME, event) == ROWS_AT_A_TIME
