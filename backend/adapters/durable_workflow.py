"""Runs the agent's work as DBOS workflows. The only module that imports DBOS.

Nothing is noted of a single batch but its records, under a generation that is reached only once: a step of
its own would cost two more commits and say the same. So one workflow of one step runs as many batches as come
one after the other, and they share what it costs to begin and to end it.
"""

import logging
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import TYPE_CHECKING, Final, NoReturn

import sqlalchemy as sa

from backend.adapters.records.availability import Availability
from backend.adapters.records.database import Database
from backend.adapters.records.postgresql import said
from backend.errors import StartRefusedError

if TYPE_CHECKING:
    from dbos import DBOSConfig, Serializer

# Interrupted workflows are recovered only by the same version: change it with the shape of the workflow.
APPLICATION_VERSION: Final = "2"
# Held while DBOS runs. It is one for the process: a second service would get the first one's, keep its
# workflows in the first one's database, and have no DBOS any more when the first one ends.
_ALONE: Final = Lock()
_WORKFLOW: Final = "commit_burst"
# DBOS never deletes anything. Finished workflows are kept for a look, and then deleted, a few at a time.
_KEEP_FINISHED: Final = timedelta(minutes=5)
_DELETED_AT_ONCE: Final = 2_000
# DBOS's listener sleeps that long before it sees a stop. It asks the database nothing on our behalf.
_LISTENER_SECONDS: Final = 0.1
# DBOS's listener logs this before anything of ours meets the outage. It connects again by itself.
_LISTENER: Final = "Notification listener error"
_SCHEMA: Final = "dbos"
# DBOS's tables whose rows name their decoder.
_DECODED: Final = (
    "workflow_status",
    "operation_outputs",
    "notifications",
    "workflow_events",
    "workflow_events_history",
    "streams",
)
# DBOS decodes these as the workflow's row in workflow_status says. No foreign key binds them to that.
_PAYLOADS: Final = ("workflow_input", "workflow_output")


class _Brief(logging.Filter):
    """Shortens DBOS's log records, which may quote rows, and drops them while the database is away."""

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


class DurableWorkflow:
    """Runs a function as the one step of a workflow.

    The workflow's only argument is the run's name: changes stay in memory, because a process that dies takes
    the clients who wait for them with it. It leaves behind nothing, or records that the next start brings to
    the hub.
    """

    def __init__(self, database: Database, hub_name: str) -> None:
        self._database = database
        self._hub_name = hub_name
        # The run under way: its name, what it does, and what that raised.
        self._run_name = ""
        self._work: Callable[[], None] = lambda: None
        self._raised: Exception | None = None
        self._stack = ExitStack()

    def launch(self) -> None:
        """Start DBOS, which recovers in the background the workflows that an earlier process left."""
        # The import takes as long as `wg` needs for thousands of peers, and nothing before this needs it.
        from dbos import DBOS, DBOSPortableJSONSerializer  # noqa: PLC0415 - a slow import

        self._require_no_other_dbos()
        self._dbos = DBOS
        self._quieten()

        @DBOS.step(name="commit_batches")
        def commit_batches() -> None:
            try:
                self._work()
            except Exception as exc:  # noqa: BLE001 - raised again by run
                # DBOS would write it into the database, and a driver's error carries a row's values.
                self._raised = exc

        @DBOS.workflow(name=_WORKFLOW)
        def commit_burst(name: str) -> None:
            # A workflow of an earlier process has nothing to do: each start reconciles with the records.
            if name == self._run_name:
                commit_batches()

        self._workflow = commit_burst
        serializer = DBOSPortableJSONSerializer()
        _refuse_pickles()
        dbos = DBOS(config=self._configuration(serializer))
        self._stack.callback(DBOS.destroy, destroy_registry=True)
        try:
            _delete_unreadable(self._database.engine, serializer.name())
            DBOS.launch()
        except Exception as exc:
            raise StartRefusedError(f"DBOS can't start on the database: {said(exc)}") from exc
        # Otherwise DBOS would block the agent's thread while the database is away, and up to a minute longer.
        # DBOS has a public setting for this in its client only.
        dbos._sys_db._retry_connection_errors = False  # noqa: SLF001 - no option sets it

    def run(self, work: Callable[[], None]) -> None:
        """Run a function, in this thread, as a workflow; raise what it raises."""
        self._work, self._raised = work, None
        self._run_name = uuid.uuid4().hex
        try:
            with self._database.writing():
                self._workflow(self._run_name)
        finally:
            self._run_name = ""
        if self._raised is not None:
            raise self._raised

    def delete_finished(self) -> None:
        """Delete workflows that have ended; raise RecordsUnavailableError."""
        # DBOS itself would wait for a database that is away, for as long as that takes.
        self._database.check()
        ended = self._dbos.list_workflows(
            name=_WORKFLOW,
            completed_before=(datetime.now(UTC) - _KEEP_FINISHED).isoformat(),
            limit=_DELETED_AT_ONCE,
            load_input=False,
            load_output=False,
        )
        if ended:
            self._dbos.delete_workflows([workflow.workflow_id for workflow in ended])

    def close(self) -> None:
        """Stop DBOS."""
        self._stack.close()

    def _require_no_other_dbos(self) -> None:
        from dbos import _dbos  # noqa: PLC0415 - a slow import

        alone = _ALONE.acquire(blocking=False)
        if alone:
            self._stack.callback(_ALONE.release)
        if not alone or _dbos._dbos_global_instance is not None:  # noqa: SLF001 - no function tells it
            raise StartRefusedError(
                "DBOS runs once in a process, and this one runs it already; run the service in a process of "
                "its own, or set ENABLE_DBOS=false for records in memory"
            )

    def _configuration(self, serializer: "Serializer") -> "DBOSConfig":
        return {
            "name": "wireguard-provisioning",
            "system_database_url": self._database.url.render_as_string(hide_password=False),
            "system_database_engine": self._database.engine,
            "application_version": APPLICATION_VERSION,
            "executor_id": self._hub_name,
            "log_level": "WARNING",
            "notification_listener_polling_interval_sec": _LISTENER_SECONDS,
            "serializer": serializer,
        }

    def _quieten(self) -> None:
        dbos_log = logging.getLogger("dbos")
        dbos_log.setLevel(logging.WARNING)
        brief = _Brief(self._database.availability, self._database.writability)
        dbos_log.addFilter(brief)
        self._stack.callback(dbos_log.removeFilter, brief)
        # DBOS adds a handler that writes to stderr unless its logger has a handler already.
        if not dbos_log.handlers:
            dbos_log.addHandler(logging.NullHandler())


def _refuse_pickles() -> None:
    """Make every later attempt of DBOS to read a pickle in this process raise an error."""
    # The import takes long, and nothing before DBOS's launch needs it.
    from dbos._serialization import DefaultSerializer  # noqa: PLC0415 - a slow import

    # On the class: DBOS's own instance is used wherever a row names this decoder.
    setattr(DefaultSerializer, DefaultSerializer.deserialize.__name__, _refuse)


def _refuse(*_: object) -> NoReturn:
    raise RuntimeError("A row of DBOS's tables holds a pickle, which is never read.")


def _delete_unreadable(engine: sa.Engine, serializer: str) -> None:
    """Delete, undecoded, what DBOS's tables hold from any other serializer, as an earlier version's pickles.

    Nothing is lost: the peers' records are in tables of their own, and each start brings the hub to them.
    """
    schema = _SCHEMA if engine.dialect.name == "postgresql" else None
    with engine.begin() as connection:
        found = sa.inspect(connection).get_multi_columns(schema, filter_names=[*_DECODED, *_PAYLOADS])
        # On the first start there are none.
        tables = {
            name: sa.table(name, *(sa.column(column["name"]) for column in columns), schema=schema)
            for (_, name), columns in found.items()
        }
        for name in set(_DECODED) & set(tables):
            rows = tables[name]
            connection.execute(sa.delete(rows).where(rows.c.serialization.is_distinct_from(serializer)))
        for name in set(_PAYLOADS) & set(tables):
            rows, workflows = tables[name], tables["workflow_status"]
            orphaned = rows.c.workflow_uuid.not_in(sa.select(workflows.c.workflow_uuid))
            connection.execute(sa.delete(rows).where(orphaned))
