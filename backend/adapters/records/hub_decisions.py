"""Where an operator's decision about the hub comes into the records, whether the service runs or not."""

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters.records import hub_records
from backend.adapters.records.database import Database
from backend.adapters.records.sql_journal import SqlJournal
from backend.errors import RecordsUnavailableError
from backend.models.access.audit import AuditEvent
from backend.services.hub.hub_mirror import HubMirror
from backend.services.hub.mark import HubMark
from backend.services.hub.review import HubReview
from backend.services.ports import Decision


class HubDecisions:
    """Reads records, file and interface, and writes what was decided; each call a transaction of its own."""

    def __init__(self, database: Database, mirror: HubMirror, mark: HubMark) -> None:
        self._engine: sa.Engine = database.engine
        self._journal = SqlJournal(database)
        self._mirror = mirror
        self._mark = mark

    def review(self) -> HubReview:
        """Compare the records with the hub, and change nothing."""
        return HubReview.make(self._journal, self._mirror, self._mark.read())

    def decide(self, decision: Decision, basis: str, event: AuditEvent) -> None:
        """Write a decision about the unknown peers of `basis`, for the service to carry out."""
        try:
            with self._engine.begin() as connection:
                hub_records.decide(connection, decision, basis, event)
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be written; check the database") from exc

    def is_pending(self) -> bool:
        """Say whether a decision waits for the service."""
        return self._journal.hub_status().decision is not None

    def acknowledge(self, event: AuditEvent) -> int:
        """Delete all notices, and return how many there were."""
        try:
            with self._engine.begin() as connection:
                return hub_records.acknowledge(connection, event)
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be written; check the database") from exc
