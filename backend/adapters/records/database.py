"""The database's engine, its exclusive use, and its schema brought up to date."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from backend.adapters.records import sqlite
from backend.adapters.records.availability import Availability
from backend.adapters.records.postgresql import NOTHING_CHANGED, PostgreSQL, said, without_timeouts
from backend.adapters.records.sqlite import SqliteFile
from backend.errors import InUseError, NewerSchemaError, RecordsUnavailableError, StartRefusedError
from backend.services.no_metrics import NO_METRICS
from backend.services.ports import DatabaseOperation, Metrics
from backend.services.stopwatch import measured

# The database is away, locked, full or read-only.
_NOT_WRITTEN: Final = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
# A database that lives as long as the process.
IN_MEMORY: Final = "sqlite:///:memory:"
_TRIAL_TIMEOUT_MS: Final = 2_000
# A commit within so many seconds shows that the database is writable.
_WRITTEN_SECONDS: Final = 1.0
# How long a command waits for another process's migration.
_MIGRATION_SECONDS: Final = 3.0
# DBOS keeps about five connections busy for a moment while a datasource transaction holds another.
_POOL_SIZE: Final = 10


class Database:
    """One database with the schema of this version.

    The service has it for itself (`exclusive`); the command line works beside it, in short transactions.
    """

    def __init__(
        self,
        url: str,
        *,
        exclusive: bool = True,
        copies: Path | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """Open it. `copies` is where a SQLite file is copied to before a migration; by default, beside it."""
        self.url = sa.make_url(url)
        # Without the query, too: a password may stand there.
        self.name = self.url.set(query={}).render_as_string(hide_password=True)
        # False where it lives as long as the process.
        self.durable = url != IN_MEMORY
        self._copies = copies
        self._metrics = metrics
        self._exclusive = exclusive
        self.availability = Availability(self.name)
        self.writability = Availability(self.name, "database_not_writable", "database_writable")
        self._written_at = float("-inf")
        self._file: SqliteFile | None = None
        self._server: PostgreSQL | None = None
        with ExitStack() as stack:
            if not self.durable:
                self.engine = sqlite.open_memory()
            elif self.url.get_backend_name() == "sqlite":
                self.engine = self._open_sqlite(stack)
            else:
                self.engine = self._open_postgresql(stack)
            stack.callback(self.engine.dispose)
            self._stack = stack.pop_all()

    def note_written(self) -> None:
        """Note a successful commit: `try_to_write` then needs no trial for a while."""
        self._written_at = time.monotonic()
        self.writability.found()

    def note_not_written(self, exc: Exception) -> None:
        """Note a commit that failed; log the outage once."""
        self._written_at = float("-inf")
        if self.availability.reason is None:
            self.writability.lost(said(exc))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the driver's errors into RecordsUnavailableError, and log the outage once."""
        try:
            yield
        except _NOT_WRITTEN as exc:
            self.note_not_written(exc)
            raise RecordsUnavailableError("the records can't be written; check the database") from None

    def timing(self, operation: DatabaseOperation) -> AbstractContextManager[None]:
        """Measure a transaction for the metrics."""
        return measured(partial(self._metrics.database_used, operation))

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Yield a connection to read by; raise RecordsUnavailableError where the database can't be read."""
        self.require()
        try:
            with self.timing("read"), self.engine.connect() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be read; check the database") from exc

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Yield the connection of a transaction; raise RecordsUnavailableError where it fails."""
        self.require()
        self.check_file()
        try:
            with self.timing("write"), self.engine.begin() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be written; check the database") from exc
        # A commit to a file that was moved or deleted meanwhile succeeds, and is lost with it.
        self.check_file()

    def try_to_write(self, harmless: sa.Update) -> None:
        """Try a write; raise RecordsUnavailableError where it fails.

        Waits no longer than a health check may. Does nothing where a commit has just succeeded.
        """
        if time.monotonic() - self._written_at < _WRITTEN_SECONDS:
            return
        is_file = self.engine.dialect.name == "sqlite"
        try:
            with self.engine.begin() as connection:
                if is_file:
                    connection.exec_driver_sql(f"PRAGMA busy_timeout={_TRIAL_TIMEOUT_MS}")
                try:
                    connection.execute(harmless)
                finally:
                    if is_file and not connection.invalidated:
                        connection.exec_driver_sql(f"PRAGMA busy_timeout={sqlite.BUSY_TIMEOUT_MS}")
        except SQLAlchemyError as exc:
            self.note_not_written(exc)
            raise RecordsUnavailableError(f"the database can't be written: {said(exc)}") from exc
        self.note_written()

    def has_room(self) -> bool:
        """Say whether a SQLite file's disk has room; True for PostgreSQL, whose disk this host can't see."""
        return self._file is None or self._file.has_room()

    def close(self) -> None:
        """Close every connection and let another process have the database."""
        self._stack.close()

    def is_current(self) -> bool:
        """Say whether the schema is this version's; raise StartRefusedError where it can't be read."""
        heads = ScriptDirectory(str(_MIGRATIONS)).get_heads()
        try:
            with self.engine.connect() as connection:
                return set(MigrationContext.configure(connection).get_current_heads()) == set(heads)
        except SQLAlchemyError as exc:
            raise StartRefusedError(f"the schema of {self.name} can't be read: {said(exc)}") from exc

    def migrate(self) -> None:
        """Bring the schema up to date; do nothing, quickly, where it is. Only for an exclusive use."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        scripts = ScriptDirectory.from_config(config)
        try:
            self._require_whole()
            with self.engine.begin() as connection:
                current = MigrationContext.configure(connection).get_current_heads()
                if set(current) == set(scripts.get_heads()):
                    return
                scripts.get_revisions(current)  # raises CommandError for what is newer than this version
                driver = connection.connection.driver_connection
                if current and isinstance(driver, sqlite3.Connection):
                    beside = Path(str(self.url.database)).absolute().parent
                    sqlite.copy_before_migration(driver, "-".join(current), self._copies or beside)
                config.attributes["connection"] = connection
                with without_timeouts(connection):
                    command.upgrade(config, "head")
        except CommandError as exc:
            raise NewerSchemaError(
                f"{self.name} was made by a newer version; run that one, or restore a backup"
            ) from exc
        except SQLAlchemyError as exc:
            raise StartRefusedError(f"the schema of {self.name} can't be updated: {said(exc)}") from exc

    def _require_whole(self) -> None:
        """Refuse a damaged SQLite file, such as a copy that was made during a write."""
        if self._file is None:
            return
        try:
            with self.engine.connect() as connection:
                found = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one())
        except sa.exc.OperationalError:
            raise  # it can't be read at the moment, which says nothing of what is in it
        except sa.exc.DatabaseError as exc:
            found = said(exc)
        if found != "ok":
            raise StartRefusedError(
                f"{self.name} is damaged ({found.splitlines()[-1]}); move it away with its -wal and -shm "
                "and put a backup in its place, or save what it still holds by the `.recover` of sqlite3(1)"
            )

    def _open_sqlite(self, stack: ExitStack) -> sa.Engine:
        if not self.url.database or self.url.database == ":memory:":
            raise StartRefusedError(
                "DATABASE_URL names no file; write sqlite:////absolute/path, or set ENABLE_DBOS=false"
            )
        self._file = stack.enter_context(closing(SqliteFile(Path(self.url.database).absolute())))
        if self._exclusive:
            stack.enter_context(self._file.lock())
        # Connections are handed from thread to thread by the pool, never used by two at once.
        engine = sa.create_engine(
            self.url, pool_size=_POOL_SIZE, max_overflow=_POOL_SIZE, connect_args={"check_same_thread": False}
        )
        sa.event.listen(engine, "do_connect", self._before_connect)
        sa.event.listen(engine, "connect", sqlite.prepare)
        sa.event.listen(engine, "checkout", sqlite.drop_read_only)
        sa.event.listen(engine, "handle_error", self._note_read_only)
        return engine

    def _note_read_only(self, context: sa.engine.ExceptionContext) -> None:
        if sqlite.refuses_writes(context.original_exception):
            context.is_disconnect = True
            # Before DBOS meets it, which tries to write once a second.
            self.note_not_written(Exception(context.original_exception))

    def _before_connect(self, *_: Any) -> None:
        """Open the service's own file or none: SQLite would make a new one where it is gone."""
        try:
            self.check_file()
        except RecordsUnavailableError as exc:
            raise sqlite3.OperationalError(str(exc)) from exc

    def _open_postgresql(self, stack: ExitStack) -> sa.Engine:
        server = PostgreSQL(self.url, self.availability, patient=not self._exclusive, pool_size=_POOL_SIZE)
        self._server = server
        stack.callback(server.leave)
        try:
            if self._exclusive and not server.occupy():
                raise InUseError(
                    f"The database {self.name} is already used by another hub's service; give each hub its "
                    "own"
                )
            server.engine.connect().close()
        except SQLAlchemyError as exc:
            raise StartRefusedError(f"{self.name} does not answer; check DATABASE_URL: {said(exc)}") from exc
        return server.engine

    def check_file(self) -> None:
        """Raise RecordsUnavailableError where the database's path leads to another file by now, or to none.

        Takes a few microseconds. What was committed before is safe only if this raises nothing afterwards.
        """
        if self._file is None:
            return
        try:
            self._file.check()
        except RecordsUnavailableError as exc:
            self.availability.lost(str(exc))
            raise
        self.availability.found()

    def require(self) -> None:
        """Raise RecordsUnavailableError at once where the server is known to be away."""
        if self._server is not None and self.availability.reason is not None:
            raise RecordsUnavailableError(NOTHING_CHANGED)

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the database answers, OvertakenError where another has it.

        Only this method tries to reach a server that was away.
        """
        if self._server is None:
            # The file is ours alone for as long as we hold its lock file.
            self.check_file()
            return
        try:
            self._server.check()
        except SQLAlchemyError as exc:
            self.availability.lost(said(exc))
            raise RecordsUnavailableError(NOTHING_CHANGED) from exc
        self.availability.found()


def open_beside(url: str, copies: Path | None = None) -> Database:
    """Open the database for a command, whether the service runs or not. `copies` is Database's."""
    until = time.monotonic() + _MIGRATION_SECONDS
    while True:
        database = Database(url, exclusive=False)
        with ExitStack() as failing:
            failing.callback(database.close)
            if database.is_current():
                failing.pop_all()
                return database
        # Taken for itself only where it must be: a service that comes meanwhile, or that has lost its
        # connection for a moment, would take the command for another hub's service.
        try:
            with closing(Database(url, copies=copies)) as alone:
                alone.migrate()
        except InUseError:
            if time.monotonic() > until:
                raise StartRefusedError(
                    f"{database.name} is used by a service of another version; restart that one"
                ) from None
            # The other process may be about to do the same.
            time.sleep(0.1)
