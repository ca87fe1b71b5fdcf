"""Credentials, audit log, answers and nonces in the records' database: each call is a transaction."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from backend.adapters.records import audit, credentials, idempotency
from backend.adapters.records.database import Database
from backend.models.access.audit import AuditEvent, AuditQuery, AuditRecord, verify
from backend.models.access.credentials import Credential
from backend.models.access.idempotency import Answer


class SqlAccessStore:
    """Implements AccessStore. SQLite allows one writer at a time: the others wait for it, up to 30 s."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load_credentials(self) -> tuple[int, list[Credential]]:
        """Return every credential, and their version."""
        with self._database.reading() as connection:
            # The version first: a credential that is made in between is then found at the next look.
            return credentials.credentials_version(connection), credentials.load_credentials(connection)

    def credentials_version(self) -> int:
        """Return the number that changes whenever a credential is made or revoked."""
        with self._database.reading() as connection:
            return credentials.credentials_version(connection)

    def keep_credential(self, credential: Credential, event: AuditEvent) -> None:
        """Keep a new credential."""
        with self._database.transaction() as connection:
            credentials.insert_credential(connection, credential)
            audit.append_audit(connection, [event])

    def revoke_credential(self, credential_id: str, event: AuditEvent) -> Credential | None:
        """Revoke a credential at the event's time and return it, or None if there is none."""
        with self._database.transaction() as connection:
            revoked = credentials.revoke_credential(connection, credential_id, event.at)
            if revoked is not None:
                audit.append_audit(connection, [event])
            return revoked

    def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
        """Append to the audit log, and note when credentials were used last."""
        with self._database.transaction() as connection:
            credentials.note_used(connection, used)
            audit.append_audit(connection, events)

    def audit_page(self, query: AuditQuery) -> list[AuditRecord]:
        """Return rows of the audit log, the newest first."""
        with self._database.reading() as connection:
            return audit.list_audit(connection, query)

    def verify_audit(self) -> tuple[str | None, tuple[int, str], tuple[int, str]]:
        """Return the sentence that names the first row that isn't as it was written, and the log's two ends.

        They are the sequences and hashes of its last row and of the last row that was pruned.
        """
        with self._database.reading() as connection:
            audit.hold_still(connection)
            head, start = audit.audit_head(connection), audit.audit_start(connection)
            return verify(audit.iterate_audit(connection), head, start), head, start

    def prune_audit(self, before: datetime, limit: int, event: AuditEvent) -> int:
        """Delete the oldest rows of the audit log, at most `limit`, all from before a moment; count them."""
        with self._database.transaction() as connection:
            return audit.prune(connection, before, limit, event)

    def audit_until(self, before: datetime) -> Iterator[AuditRecord]:
        """Read the rows that `prune_audit` would delete, in order, as they are at one moment."""
        with self._database.reading() as connection:
            audit.hold_still(connection)
            for record in audit.iterate_audit(connection):
                if record.event.at >= before:
                    break
                yield record

    def find_answer(self, scope: str, key_hash: str) -> Answer | None:
        """Return what was answered to this key within the last 24 hours."""
        with self._database.reading() as connection:
            return idempotency.find_answer(connection, scope, key_hash)

    def tidy(self, now: datetime | None = None) -> None:
        """Delete the stored answers and nonces that are no longer needed at a moment, by default this one."""
        with self._database.transaction() as connection:
            idempotency.tidy(connection, now or datetime.now(UTC))
