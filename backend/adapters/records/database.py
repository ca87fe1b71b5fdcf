"""The database's engine, its exclusive use, and its schema brought up to date."""

import os
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters.host.lock_file import LockFile
from backend.adapters.records import sqlite
from backend.adapters.records.availability import Availability
from backend.adapters.records.database_file import DatabaseFile
from backend.adapters.records.migration_copy import copy_before_migration
from backend.adapters.records.postgresql import NOTHING_CHANGED, PostgreSQL, said, without_timeouts
from backend.errors import InUseError, RecordsUnavailableError, StartRefusedError
from backend.models.trusted_paths import make_private_directory, require_trusted_file

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
# A database that lives as long as the process.
IN_MEMORY: Final = "sqlite:///:memory:"
_TRIAL_TIMEOUT_MS: Final = 2_000
# For how long what was written shows that the next can be: seconds.
_WRITTEN_SECONDS: Final = 1.0
# How long a command waits for another process's migration.
_MIGRATION_SECONDS: Final = 3.0
# DBOS keeps about five connections busy for a moment while a datasource transaction holds another.
_POOL_SIZE: Final = 10
# A batch with its workflow, and SQLite's write-ahead log when it's checkpointed.
_ROOM_BYTES: Final = 4 * 1024 * 1024


class Database:
    """One database with the schema of this version.

    The service has it for itself (`exclusive`); the command line works beside it, in short transactions.
    """

    def __init__(self, url: str, *, exclusive: bool = True, copies: Path | None = None) -> None:
        """Open it. `copies` is where a SQLite file is copied to before a migration; by default, beside it."""
        self.url = sa.make_url(url)
        self._copies = copies
        self._exclusive = exclusive
        self.availability = Availability(self._name())
        self.writability = Availability(self._name(), "database_not_writable", "database_writable")
        self._written_at = float("-inf")
        self._stack = ExitStack()
        # Where the database is a file of this host's.
        self._file: DatabaseFile | None = None
        self._directory: Path | None = None
        # Where it is a server's.
        self._server: PostgreSQL | None = None
        if url == IN_MEMORY:
            self.engine = sqlite.open_memory()
        elif self.url.get_backend_name() == "sqlite":
            self.engine = self._open_sqlite()
        else:
            self.engine = self._open_postgresql()

    @property
    def durable(self) -> bool:
        """False where it lives as long as the process."""
        return self._file is not None or self._server is not None

    def note_written(self) -> None:
        """Have it known that something was committed just now."""
        self._written_at = time.monotonic()
        self.writability.found()

    def note_not_written(self, exc: Exception) -> None:
        """Have it known that something could not be committed; the log says so once."""
        self._written_at = float("-inf")
        if self.availability.reason is None:
            self.writability.lost(said(exc))

    @contextmanager
    def trial(self) -> Iterator[sa.Connection | None]:
        """Yield a connection for a write that shows whether the next one would succeed.

        It waits no longer than a health check may. None where something was written a moment ago.
        """
        if time.monotonic() - self._written_at < _WRITTEN_SECONDS:
            yield None
            return
        is_file = self.engine.dialect.name == "sqlite"
        with self.engine.begin() as connection:
            if is_file:
                connection.exec_driver_sql(f"PRAGMA busy_timeout={_TRIAL_TIMEOUT_MS}")
            try:
                yield connection
            finally:
                if is_file and not connection.invalidated:
                    connection.exec_driver_sql(f"PRAGMA busy_timeout={sqlite.BUSY_TIMEOUT_MS}")

    def has_room(self) -> bool:
        """Say whether more can be written, as far as this host can see: a server's disk is its own affair."""
        if self._directory is None:
            return True
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize >= _ROOM_BYTES

    def close(self) -> None:
        """Close every connection and let another process have the database."""
        self._stack.close()
        self.engine.dispose()

    def is_current(self) -> bool:
        """Say whether the schema is this version's; raise StartRefusedError where it can't be read."""
        heads = ScriptDirectory(str(_MIGRATIONS)).get_heads()
        try:
            with self.engine.connect() as connection:
                return set(MigrationContext.configure(connection).get_current_heads()) == set(heads)
        except SQLAlchemyError as exc:
            raise StartRefusedError(f"the schema of {self._name()} can't be read: {said(exc)}") from exc

    def migrate(self) -> None:
        """Bring the schema up to date; do nothing, quickly, where it is.

        Beside a service that runs nothing is changed, and another schema than this version's is refused.
        """
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        scripts = ScriptDirectory.from_config(config)
        try:
            self._require_whole()
            with self.engine.begin() as connection:
                current = MigrationContext.configure(connection).get_current_heads()
                if set(current) == set(scripts.get_heads()):
                    return
                if not self._exclusive:
                    raise StartRefusedError(
                        f"{self._name()} is used by a service of another version; restart that one"
                    )
                scripts.get_revisions(current)  # raises CommandError for what is newer than this version
                if current:
                    self._copy(connection, "-".join(current))
                config.attributes["connection"] = connection
                with without_timeouts(connection):
                    command.upgrade(config, "head")
        except CommandError as exc:
            raise StartRefusedError(
                f"{self._name()} was made by a newer version; run that one, or restore a backup"
            ) from exc
        except SQLAlchemyError as exc:
            raise StartRefusedError(f"the schema of {self._name()} can't be updated: {said(exc)}") from exc

    def _require_whole(self) -> None:
        """Refuse a SQLite file that is damaged, as one is that was copied while it was written."""
        if self._file is None or not self._exclusive:
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
                f"{self._name()} is damaged ({found.splitlines()[-1]}); move it away with its -wal and -shm "
                "and put a backup in its place, or save what it still holds by the `.recover` of sqlite3(1)"
            )

    def _copy(self, connection: sa.Connection, revision: str) -> None:
        driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection) and self.url.database is not None:
            beside = Path(self.url.database).absolute().parent
            copy_before_migration(driver, revision, self._copies or beside)

    def _name(self) -> str:
        # Without the query, too: a password may stand there.
        return self.url.set(query={}).render_as_string(hide_password=True)

    def _open_sqlite(self) -> sa.Engine:
        if not self.url.database or self.url.database == ":memory:":
            raise StartRefusedError(
                "DATABASE_URL names no file; write sqlite:////absolute/path, or set ENABLE_DBOS=false"
            )
        path = Path(self.url.database).absolute()
        try:
            make_private_directory(path.parent)
            require_trusted_file(path, f"the database {path} (DATABASE_URL, or STATE_DIRECTORY)")
            # From birth: SQLite gives its -wal and -shm the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            # SQLite names what belongs to the file after the file itself, wherever a link to it is.
            real = Path(os.path.realpath(path))
            for made in (real, real.with_name(real.name + "-wal"), real.with_name(real.name + "-shm")):
                with suppress(FileNotFoundError):
                    made.chmod(0o600)
        except OSError as exc:
            raise StartRefusedError(
                f"the database {path} can't be made or written ({exc.strerror}); "
                "give this process a STATE_DIRECTORY or a DATABASE_URL that it may write to"
            ) from exc
        if self._exclusive:
            if real.stat().st_nlink != 1:
                raise StartRefusedError(
                    f"the database {path} has another name too, by which a second service could write to it; "
                    f"`find / -xdev -samefile {shlex.quote(str(real))}` shows all its names; leave it one"
                )
            # Beside the file itself, whichever link led to it: two services would undo each other's work.
            lock = LockFile(real.with_name(real.name + ".lock"), f"The database {path}").acquire()
            self._stack.callback(lock.release)
        self._file, self._directory = DatabaseFile(path), path.parent
        self._stack.callback(self._file.close)
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

    def _open_postgresql(self) -> sa.Engine:
        server = PostgreSQL(self.url, self.availability, patient=not self._exclusive, pool_size=_POOL_SIZE)
        self._server = server
        self._stack.callback(server.leave)
        mine = True
        try:
            if self._exclusive:
                mine = server.occupy()
            else:
                server.answers()
        except SQLAlchemyError as exc:
            server.engine.dispose()
            raise StartRefusedError(
                f"{self._name()} does not answer; check DATABASE_URL: {said(exc)}"
            ) from exc
        if not mine:
            server.leave()
            server.engine.dispose()
            raise InUseError(
                f"The database {self._name()} is already used by another hub's service; give each hub its own"
            )
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
        """Raise RecordsUnavailableError where the database is known to be away: at once, for any thread."""
        if self._server is not None and self.availability.reason is not None:
            raise RecordsUnavailableError(NOTHING_CHANGED)

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the database answers, OvertakenError where another has it.

        This alone finds out that a server is back.
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
    # Taken for itself only where it must be: a service that comes meanwhile, or that has lost its connection
    # for a moment, would take the command for another hub's service.
    until = time.monotonic() + _MIGRATION_SECONDS
    while not _is_current(url):
        try:
            alone = Database(url, copies=copies)
        except InUseError:
            # Whoever has it may be about to do the same.
            if time.monotonic() > until:
                break
            time.sleep(0.1)
            continue
        try:
            alone.migrate()
        finally:
            alone.close()
    database = Database(url, exclusive=False)
    try:
        database.migrate()
    except BaseException:
        database.close()
        raise
    return database


def _is_current(url: str) -> bool:
    database = Database(url, exclusive=False)
    try:
        return database.is_current()
    finally:
        database.close()
