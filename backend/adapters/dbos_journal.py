"""Durable records: each burst of batches is one DBOS workflow over the records' own database."""

import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import TYPE_CHECKING, Final

from backend.adapters.dbos_pickles import delete_unreadable, refuse_pickles
from backend.adapters.records.availability import Availability
from backend.adapters.records.database import Database
from backend.adapters.records.postgresql import said
from backend.adapters.records.sql_journal import SqlJournal
from backend.errors import StartRefusedError
from backend.services.batches import run_sequence
from backend.services.ports import Batch, NextBatch

if TYPE_CHECKING:
    from dbos import DBOSConfig, Serializer

log = logging.getLogger(__name__)

# Interrupted workflows are recovered only by the same version: change it with the shape of the sequence.
APPLICATION_VERSION: Final = "2"
# Held while DBOS runs. It is one for the process: a second service would get the first one's, keep its
# workflows in the first one's database, and have no DBOS any more when the first one ends.
_ALONE: Final = Lock()
_WORKFLOW: Final = "commit_burst"
# DBOS never deletes anything. What has ended is kept for a look, and then goes, a few at a time.
_KEEP_FINISHED: Final = timedelta(minutes=5)
_TIDY_INTERVAL_SECONDS: Final = 10.0
_TIDY_LIMIT: Final = 2_000
# DBOS's listener sleeps that long before it sees a stop. It asks the database nothing on our behalf.
_LISTENER_SECONDS: Final = 0.1
# DBOS's listener says this before anything of ours meets the outage. It connects again by itself.
_LISTENER: Final = "Notification listener error"


class _Brief(logging.Filter):
    """Leaves out DBOS's tracebacks and statements, and all that it says while the database fails."""

    def __init__(self, *watched: Availability) -> None:
        super().__init__()
        self._watched = watched

    def filter(self, record: logging.LogRecord) -> bool:
        """Make a record brief, or drop it."""
        message = record.getMessage()
        if message.startswith(_LISTENER) or not all(each.is_settled() for each in self._watched):
            return False
        # A driver's second line has the statement's values.
        record.msg, record.args = message.partition("\n")[0], None
        if record.exc_info is not None and record.exc_info[0] is not None:
            record.msg += f" {record.exc_info[0].__name__}"
            record.exc_info = None
        return True


class DbosJournal(SqlJournal):
    """Takes each burst of batches through one workflow of one step, in which each intent is a transaction.

    Nothing is noted of the single batch but its records, under a generation that is reached only once: a
    step of its own would cost two more commits and say the same. A batch waits for nobody: a burst goes on
    for as long as the next batch is there when the last one is done, so that what it costs to begin and end
    a workflow is shared.

    The workflow's only argument is the burst's name: changes stay in memory, because a process that dies
    takes the clients who wait for them with it. What it leaves behind is either nothing, or records that the
    next start brings to the hub.
    """

    def __init__(self, database: Database, hub_name: str) -> None:
        super().__init__(database)
        self._hub_name = hub_name
        self._brief = _Brief(database.availability, database.writability)
        self._burst = ""
        self._next_batch: NextBatch = lambda: None
        self._raised: Exception | None = None
        self._launched = False
        self._alone = False
        self._tidied_at = time.monotonic()

    def launch(self, apply: Callable[[Batch | None], str | None]) -> None:
        """Start DBOS, which takes up in the background what an earlier process left unfinished."""
        # The import takes as long as `wg` needs for thousands of peers, and nothing before this needs it.
        from dbos import DBOS, DBOSPortableJSONSerializer  # noqa: PLC0415 - see above

        super().launch(apply)
        self._require_no_other_dbos()
        self._dbos = DBOS
        self._quieten()

        @DBOS.step(name="commit_batches")
        def commit_batches() -> None:
            try:
                run_sequence(self._next_batch, self)
            except Exception as exc:  # noqa: BLE001 - raised again by run
                # DBOS would write it into the database, and a driver's error carries a row's values.
                self._raised = exc

        @DBOS.workflow(name=_WORKFLOW)
        def commit_burst(burst: str) -> None:
            if burst == self._burst:
                commit_batches()
            else:
                # An earlier process's. Every start reconciles the hub with all the records, so there is
                # nothing left to do but to see that.
                self._apply(None)

        self._workflow = commit_burst
        serializer = DBOSPortableJSONSerializer()
        refuse_pickles()
        dbos = DBOS(config=self._configuration(serializer))
        self._launched = True
        try:
            delete_unreadable(self._engine, serializer.name())
            DBOS.launch()
        except Exception as exc:
            raise StartRefusedError(f"DBOS can't start on the database: {said(exc)}") from exc
        # Or it would wait for a database that is away, in the one thread that writes, for as long as that
        # takes, and up to a minute longer. DBOS offers this to its client alone.
        dbos._sys_db._retry_connection_errors = False  # noqa: SLF001 - see above

    def _require_no_other_dbos(self) -> None:
        from dbos import _dbos  # noqa: PLC0415 - as in launch

        self._alone = _ALONE.acquire(blocking=False)
        if not self._alone or _dbos._dbos_global_instance is not None:  # noqa: SLF001 - has no other name
            raise StartRefusedError(
                "DBOS runs once in a process, and this one runs it already; run the service in a process of "
                "its own, or set ENABLE_DBOS=false for records in memory"
            )

    def _configuration(self, serializer: "Serializer") -> "DBOSConfig":
        return {
            "name": "wireguard-provisioning",
            "system_database_url": self._database.url.render_as_string(hide_password=False),
            "system_database_engine": self._engine,
            "application_version": APPLICATION_VERSION,
            "executor_id": self._hub_name,
            "log_level": "WARNING",
            "notification_listener_polling_interval_sec": _LISTENER_SECONDS,
            "serializer": serializer,
        }

    def _quieten(self) -> None:
        dbos_log = logging.getLogger("dbos")
        dbos_log.setLevel(logging.WARNING)
        dbos_log.addFilter(self._brief)
        # DBOS adds a handler that writes to stderr unless its logger has a handler already.
        if not dbos_log.handlers:
            dbos_log.addHandler(logging.NullHandler())

    def _run(self, next_batch: NextBatch) -> None:
        self._next_batch, self._raised = next_batch, None
        self._burst = uuid.uuid4().hex
        try:
            self._workflow(self._burst)
        finally:
            self._burst = ""
        if self._raised is not None:
            raise self._raised

    def tidy(self) -> None:
        """Delete workflows that have ended."""
        super().tidy()
        now = time.monotonic()
        if now - self._tidied_at < _TIDY_INTERVAL_SECONDS:
            return
        self._tidied_at = now
        # DBOS itself would wait for a database that is away, for as long as that takes.
        self.check()
        ended = self._dbos.list_workflows(
            name=_WORKFLOW,
            completed_before=(datetime.now(UTC) - _KEEP_FINISHED).isoformat(),
            limit=_TIDY_LIMIT,
            load_input=False,
            load_output=False,
        )
        if ended:
            self._dbos.delete_workflows([workflow.workflow_id for workflow in ended])

    def close(self) -> None:
        """Stop DBOS and close the database."""
        if self._launched:
            self._dbos.destroy(destroy_registry=True)
            logging.getLogger("dbos").removeFilter(self._brief)
        if self._alone:
            self._alone = False
            _ALONE.release()
        super().close()
