"""Durable records: each batch is one DBOS workflow over the records' own database."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from dbos import DBOS, SQLAlchemyDatasource
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters import records
from backend.adapters.database import Database, said
from backend.errors import RecordsUnavailableError, StartRefusedError
from backend.services.hub_committer import run_sequence
from backend.services.ports import Batch, RecordedState

log = logging.getLogger(__name__)

# Interrupted workflows are recovered only by the same version: change it with the shape of the sequence.
APPLICATION_VERSION: Final = "1"
_WORKFLOW: Final = "commit_batch"
# DBOS never deletes anything. What has ended is kept for a look, and then goes, a few at a time.
_KEEP_FINISHED: Final = timedelta(minutes=5)
_TIDY_INTERVAL_SECONDS: Final = 10.0
_TIDY_LIMIT: Final = 2_000


def _brief(record: logging.LogRecord) -> bool:
    """Leave the tracebacks out: while a database is away there would be one each second."""
    if record.exc_info is not None and record.exc_info[0] is not None:
        record.msg, record.args = f"{record.getMessage()} {record.exc_info[0].__name__}", None
        record.exc_info = None
    return True


class DbosJournal:
    """Writes a batch's records, and has it applied, by one workflow.

    The intent is a transaction that is never run again. To apply it is no step: the desired state is brought
    about, whether for the first time or again, and a step would only cost a commit.

    The workflow's only argument is the batch's name: its changes stay in memory, because a process that
    dies takes the clients who wait for them with it. What it leaves behind is either nothing, or records
    that the next start brings to the hub.
    """

    def __init__(self, database: Database, hub_name: str) -> None:
        self._database = database
        self._engine = database.engine
        self._hub_name = hub_name
        self._batch: Batch | None = None
        self._removed: list[records.Row] = []
        self._launched = False
        self._tidied_at = time.monotonic()

    def load(self) -> RecordedState:
        """Read everything; raise RecordsUnavailableError."""
        try:
            with self._engine.connect() as connection:
                return records.load_state(connection)
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be read; check the database") from exc

    def launch(self, apply: Callable[[Batch | None], str | None]) -> None:
        """Start DBOS, which takes up in the background what an earlier process left unfinished."""
        self._apply = apply
        dbos_log = logging.getLogger("dbos")
        dbos_log.setLevel(logging.WARNING)
        dbos_log.addFilter(_brief)
        # DBOS writes to stderr by itself unless somebody else has taken its log.
        if not dbos_log.handlers:
            dbos_log.addHandler(logging.NullHandler())
        url = self._database.url.render_as_string(hide_password=False)
        self._datasource = SQLAlchemyDatasource.create(url, engine=self._engine)

        @DBOS.workflow(name=_WORKFLOW)
        def commit_batch(batch_id: str) -> None:
            run_sequence(self, batch_id)

        self._workflow = commit_batch
        DBOS(
            config={
                "name": "wireguard-provisioning",
                "system_database_url": url,
                "system_database_engine": self._engine,
                "application_version": APPLICATION_VERSION,
                "executor_id": self._hub_name,
                "log_level": "WARNING",
            }
        )
        self._launched = True
        try:
            DBOS.launch()
        except Exception as exc:
            raise StartRefusedError(f"DBOS can't start on the database: {said(exc)}") from exc

    def run(self, batch: Batch) -> None:
        """Take a batch through its sequence, in this thread."""
        self._batch, self._removed = batch, []
        try:
            self._workflow(batch.batch_id)
        finally:
            self._batch = None

    def mark_applied(self, generation: int) -> None:
        """Note that the hub has reached `generation`, outside of any batch."""
        try:
            with self._engine.begin() as connection:
                records.mark_applied(connection, generation)
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be written; check the database") from exc

    def tidy(self) -> None:
        """Delete workflows that have ended."""
        now = time.monotonic()
        if now - self._tidied_at < _TIDY_INTERVAL_SECONDS:
            return
        self._tidied_at = now
        # DBOS itself would wait for a database that is away, for as long as that takes.
        self.check()
        ended = DBOS.list_workflows(
            name=_WORKFLOW,
            completed_before=(datetime.now(UTC) - _KEEP_FINISHED).isoformat(),
            limit=_TIDY_LIMIT,
            load_input=False,
            load_output=False,
        )
        if ended:
            DBOS.delete_workflows([workflow.workflow_id for workflow in ended])

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the database answers."""
        try:
            self._database.check()
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the database does not answer; nothing was changed") from exc
        if not self._database.has_room():
            raise RecordsUnavailableError("the disk with the records is full; make room on it")

    def close(self) -> None:
        """Stop DBOS and close the database."""
        if self._launched:
            DBOS.destroy(destroy_registry=True)
        self._database.close()

    def intend(self, batch_id: str) -> None:
        """Write the batch's records, in one transaction."""
        self._datasource.run_tx_step({"name": "intend"}, self._write_intent, batch_id)

    def apply(self, batch_id: str) -> str | None:
        """Bring the hub up to the records."""
        return self._apply(self._held(batch_id))

    def revoke(self, batch_id: str) -> None:
        """Take the intent back, in one transaction."""
        self._datasource.run_tx_step({"name": "revoke"}, self._write_revocation, batch_id)

    # A batch that this process doesn't hold was an earlier one's. Its steps find nothing to do, because
    # every start reconciles the hub with all the records before anything else.

    def _write_intent(self, batch_id: str) -> None:
        batch = self._held(batch_id)
        if batch is not None:
            session = self._datasource.sql_session()
            self._removed = records.write_intent(session, batch)

    def _write_revocation(self, batch_id: str) -> None:
        batch = self._held(batch_id)
        if batch is not None:
            session = self._datasource.sql_session()
            records.revoke_intent(session, batch.generation, batch.accepted(), self._removed)

    def _held(self, batch_id: str) -> Batch | None:
        batch = self._batch
        return batch if batch is not None and batch.batch_id == batch_id else None
