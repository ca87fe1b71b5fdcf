"""Writes refusals, notices and the last use of keys to the audit log: events without a transaction."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Final

from backend.errors import RecordsUnavailableError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome, AuditQuery, AuditRecord
from backend.models.access.callers import SERVICE
from backend.services.access.audit_rows import AuditRows
from backend.services.ports import AccessStore

# Pruning takes some 10 ms, for which nothing else is written.
ROWS_AT_A_TIME: Final = 1000


class AuditWriter:
    """Collects events in memory until `flush` writes them. May be used by many threads.

    Accepted changes don't come here: they are logged in the transaction that writes them.
    """

    def __init__(self, store: AccessStore) -> None:
        self._store = store
        # Held by the one thread that writes, so that `page` and `close` see all earlier events written.
        self._writing = Lock()
        # Guards the two below; never held across I/O.
        self._lock = Lock()
        self._rows = AuditRows()
        self._used: dict[str, datetime] = {}

    def note(self, event: AuditEvent, credential: str | None = None) -> None:
        """Log an event at the next flush, or later where its source is over its budget of rows.

        `credential` is the ID of a real one that it is about. AuditRows says which events become one row.
        """
        with self._lock:
            self._rows.add(event, credential)

    def notice(self, action: AuditAction, reason: str | None, subject: str | None = None) -> None:
        """Log an event that the service found by itself, such as drift."""
        self.note(SERVICE.event(datetime.now(UTC), action, AuditOutcome.NOTED, subject, reason))

    def note_used(self, credential_id: str, at: datetime) -> None:
        """Record the moment of a credential's last use at the next flush."""
        with self._lock:
            self._used[credential_id] = at

    def page(self, query: AuditQuery) -> list[AuditRecord]:
        """Return rows of the audit log, the newest first, those that were just noted among them."""
        with suppress(RecordsUnavailableError):
            self.flush()
        return self._store.audit_page(query)

    def flush(self) -> None:
        """Write what was noted, as far as the budgets allow.

        Raises RecordsUnavailableError, and keeps everything for the next call.
        """
        with self._writing:
            self._flush(everything=False)

    def prune(self, keep: timedelta) -> bool:
        """Delete rows older than `keep`, some at a time; return whether more may be left.

        Each time that rows are deleted one is added, so it isn't done for every few rows that grow old.
        Raises RecordsUnavailableError.
        """
        now = datetime.now(UTC)
        event = SERVICE.event(now, AuditAction.AUDIT_PRUNED, AuditOutcome.NOTED)
        return self._store.prune_audit(now - keep, ROWS_AT_A_TIME, event) == ROWS_AT_A_TIME

    def close(self) -> None:
        """Write all events without regard to budgets; they are lost where the records are away."""
        with self._writing, suppress(RecordsUnavailableError):
            self._flush(everything=True)

    def _flush(self, *, everything: bool) -> None:
        with self._lock:
            rows = self._rows.take(all_of_them=everything)
            used, self._used = self._used, {}
        if not rows and not used:
            return
        try:
            self._store.write([event for _, event in rows], used)
        except RecordsUnavailableError:
            with self._lock:
                self._used = used | self._used
                self._rows.put_back(rows)
            raise
