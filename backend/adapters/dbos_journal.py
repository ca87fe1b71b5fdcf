"""Durable records: each batch is one DBOS workflow over the records' own database."""

import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa
from dbos import DBOS, SQLAlchemyDatasource
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters import records
from backend.adapters.database import Database, said
from backend.errors import RecordsUnavailableError, StartRefusedError
from backend.services.hub_committer import run_sequence
from backend.services.ports import Batch, NextBatch, RecordedState

log = logging.getLogger(__name__)

# Interrupted workflows are recovered only by the same version: change it with the shape of the sequence.
APPLICATION_VERSION: Final = "1"
_WORKFLOW: Final = "commit_burst"
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
    """Takes each burst of batches through one workflow, whose steps are their transactions.

    An intent is a transactional step, which is never run again. To apply it is no step: the desired state is
    brought about, whether for the first time or again, and a step would only cost a commit. It happens right
    after the transaction's own commit. A batch waits for
    nobody: a workflow goes on for as long as the next batch is there when the last one is done, so that what
    it costs to begin and end one is shared under load.

    The workflow's only argument is the burst's name: changes stay in memory, because a process that dies
    takes the clients who wait for them with it. What it leaves behind is either nothing, or records that the
    next start brings to the hub.
    """

    def __init__(self, database: Database, hub_name: str) -> None:
        self._database = database
        self._engine = database.engine
        self._hub_name = hub_name
        self._burst = ""
        self._next_batch: NextBatch = lambda: None
        self._batch: Batch | None = None
        self._removed: list[records.Row] = []
        self._applied = False
        self._failure: str | None = None
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
        def commit_burst(burst: str) -> None:
            if burst == self._burst:
                run_sequence(self)
            else:
                # An earlier process's. Every start reconciles the hub with all the records before anything
                # else, so there is nothing left to do but to see that.
                self._apply(None)

        self._workflow = commit_burst
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

    def run(self, next_batch: NextBatch) -> None:
        """Take batches through their sequence, in this thread, until there is none."""
        self._next_batch, self._batch = next_batch, None
        self._burst = uuid.uuid4().hex
        try:
            self._workflow(self._burst)
        finally:
            self._burst = ""

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

    def intend(self) -> bool:
        """Take the next batch and write its records, in one transaction."""
        self._batch, self._applied = None, False
        return self._datasource.run_tx_step({"name": "intend"}, self._write_intent)

    def apply(self) -> str | None:
        """Bring the hub up to the records, unless that was done as soon as they were durable."""
        if not self._applied:
            self._apply_batch()
        return self._failure

    def revoke(self) -> None:
        """Take the intent back, in one transaction."""
        self._datasource.run_tx_step({"name": "revoke"}, self._write_revocation)

    def _write_intent(self) -> bool:
        # Waited for in here, before the transaction's first statement: what a step costs before that is then
        # paid while nobody waits. A transaction that is tried again has its batch already.
        if self._batch is None:
            self._batch = self._next_batch()
        if self._batch is None:
            return False
        session = self._datasource.sql_session()
        self._removed = records.write_intent(session, self._batch)
        # As soon as the records are durable, and before DBOS has noted that the step is done: whoever waits
        # doesn't wait for that. What is interrupted in between is found by the next start as ever.
        sa.event.listen(session, "after_commit", lambda _: self._apply_batch(), once=True)
        return True

    def _apply_batch(self) -> None:
        self._applied = True
        self._failure = self._apply(self._batch)

    def _write_revocation(self) -> None:
        if self._batch is not None:
            records.revoke_intent(
                self._datasource.sql_session(), self._batch.generation, self._batch.accepted(), self._removed
            )
