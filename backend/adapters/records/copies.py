"""Copies of the records of SQLite or PostgreSQL, in one form: a SQLite file with our tables alone.

Without DBOS's tables: its workflows end with the process that ran them, and a start makes these tables anew.
"""

import os
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import REGCLASS
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from backend.adapters.records.credentials import access_state
from backend.adapters.records.database import Database
from backend.adapters.records.postgresql import said, without_timeouts
from backend.adapters.records.tables import hubs, metadata, notices
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import BackupError, NewerSchemaError, StartRefusedError
from backend.models.wireguard.records import RecordedState
from backend.services.hub.config_text import PeerBlock

# Where Alembic keeps the revision.
_REVISION: Final = "alembic_version"
# How many of SQLite's pages are copied at a time, 4 MiB: other threads run in between.
_PAGES: Final = 1024
_PAGE_PRAGMAS: Final = ("page_count", "page_size")
_ROWS_AT_A_TIME: Final = 500
_COMPUTED: Final = "SELECT 1 FROM sqlite_master WHERE type = 'view' OR sql LIKE 'CREATE VIRTUAL%'"
# Higher than the sequence of any row of the audit log.
_ALL_ROWS: Final = 2**62


@dataclass(frozen=True, slots=True)
class CopiedRecords:
    """What a copy holds. `revision` is its schema's."""

    state: RecordedState
    revision: str


def save(database: Database, path: Path) -> CopiedRecords:
    """Write a copy of the records as they are at one moment to a new file; return what it holds.

    Raises RecordsUnavailableError, BackupError or OSError. No transaction of another process or thread waits
    for it: in WAL mode a reader keeps no writer waiting.
    """
    with database.reading() as connection:
        driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            _save_file(driver, path)
        else:
            _save_rows(connection, path)
    database.check_file()
    with _reading_copy(), closing(_open(path)) as copy:
        copied = CopiedRecords(SqlRecords(copy).load(), _revision(copy))
    _finish(path)
    return copied


def size_of(database: Database) -> int:
    """Return about how many bytes the records take; raise RecordsUnavailableError."""
    with database.reading() as connection:
        if connection.dialect.name == "sqlite":
            pages, page = (connection.exec_driver_sql(f"PRAGMA {of}").scalar_one() for of in _PAGE_PRAGMAS)
            return int(pages * page)
        sizes = (sa.func.pg_total_relation_size(sa.cast(name, REGCLASS)) for name in metadata.tables)
        return sum(connection.execute(sa.select(*sizes)).one())


def _save_file(source: sqlite3.Connection, path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        # One read transaction around all steps: without it the copy begins anew after each write.
        source.execute("BEGIN").close()
        source.execute(f"SELECT * FROM {_REVISION}").close()  # noqa: S608 - a name of ours
        with closing(sqlite3.connect(path, isolation_level=None)) as target:
            source.backup(target, pages=_PAGES)
            _keep_our_tables(target)
    except sqlite3.Error as exc:
        raise BackupError(f"the records can't be copied ({exc})") from exc
    finally:
        source.rollback()


def _keep_our_tables(copy: sqlite3.Connection) -> None:
    # No journal: a crash loses only the copy.
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "foreign_keys=OFF"):
        copy.execute(f"PRAGMA {pragma}").close()
    found = copy.execute("SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
    for kind, name in found:
        if name not in metadata.tables and name != _REVISION and not name.startswith("sqlite_"):
            quoted = name.replace('"', '""')
            # A virtual table takes tables of its own along.
            copy.execute(f'DROP {kind} IF EXISTS "{quoted}"').close()
    copy.execute("VACUUM").close()


def _save_rows(connection: sa.Connection, path: Path) -> None:
    at_one_moment = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    try:
        with closing(_new_database(path)) as copy, copy.engine.begin() as target:
            _empty(target)
            _copy_rows(at_one_moment, target)
    except StartRefusedError as exc:
        raise BackupError(f"the records can't be copied ({exc})") from exc
    except DBAPIError as exc:
        # From the copy, not from PostgreSQL; a full disk, for example.
        if isinstance(exc.orig, sqlite3.Error):
            raise BackupError(f"the records can't be copied ({said(exc)})") from exc
        raise


def examine(path: Path) -> None:
    """Raise BackupError unless the file is an undamaged SQLite database in which no row lacks its parent."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            # The file may come from anywhere: SQL in its schema may not call functions with side effects.
            connection.execute("PRAGMA trusted_schema=OFF").close()
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found == "ok" and connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
                found = "a row belongs to another row that isn't there"
            # Behind the name of one of our tables it may have rows without end.
            if found == "ok" and connection.execute(_COMPUTED).fetchone() is not None:
                found = "it has views or virtual tables, as no backup has"
    except sqlite3.Error as exc:
        found = str(exc)
    if found != "ok":
        raise BackupError(f"the backup's records are damaged ({str(found).splitlines()[-1]})")


def rebuild(copy: Path, path: Path) -> CopiedRecords:
    """Make a new SQLite database of this version's schema with the copy's rows, and return what it holds.

    The copy itself is brought up to this version's schema. Raises BackupError where it is of a newer one.
    """
    with _reading_copy():
        with closing(_open(copy)) as old:
            revision = _revision(old)
            old.migrate()
        with closing(_new_database(path)) as new:
            with new.engine.begin() as target:
                _empty(target)
            _attach_rows(new, copy)
            state = SqlRecords(new).load()
    _finish(path)
    return CopiedRecords(state, revision)


def require_usable(rebuilt: Path) -> None:
    """Read each value as the service will; raise BackupError where that would fail only at its start."""
    with _reading_copy(), closing(_open(rebuilt)) as database:
        for peer in SqlRecords(database).load().peers:
            PeerBlock.of(peer)
        with database.engine.connect() as connection:
            streaming = connection.execution_options(yield_per=_ROWS_AT_A_TIME)
            for table in metadata.sorted_tables:
                deque(streaming.execute(sa.select(table)), maxlen=0)
    _finish(rebuilt)


@contextmanager
def _reading_copy() -> Iterator[None]:
    """Turn errors into BackupError, because their own messages name a scratch file."""
    try:
        yield
    except SQLAlchemyError as exc:
        raise BackupError(f"the backup's records can't be used ({said(exc)})") from exc
    except NewerSchemaError as exc:
        raise BackupError("the backup was made by a newer version; use that version to restore it") from exc
    except StartRefusedError as exc:
        raise BackupError(f"the backup's records can't be used ({exc})") from exc
    except OSError:
        raise
    except Exception as exc:
        # The rows may hold anything, so any error is possible.
        raise BackupError(f"the backup's records can't be used ({type(exc).__name__})") from exc


def _attach_rows(new: Database, copy: Path) -> None:
    """Copy all rows within SQLite, so that no conversion to Python changes a value."""
    with new.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("ATTACH ? AS copy", (str(copy),)).close()
        try:
            for table in metadata.sorted_tables:
                names = ", ".join(f'"{column.name}"' for column in table.columns)
                rows = f"SELECT {names} FROM copy.{table.name}"  # noqa: S608 - names of ours
                driver.execute(f"INSERT INTO main.{table.name} ({names}) {rows}").close()
            driver.commit()
        finally:
            driver.rollback()
            driver.execute("DETACH copy").close()


def _empty(target: sa.Connection) -> None:
    """Delete every row of our tables, also those that a migration has written."""
    # A trigger refuses to delete rows of the audit log beyond this sequence.
    target.execute(sa.update(access_state).values(audit_pruned_sequence=_ALL_ROWS))
    for table in reversed(metadata.sorted_tables):
        target.execute(sa.delete(table))


def _copy_rows(source: sa.Connection, target: sa.Connection) -> None:
    for table in metadata.sorted_tables:
        statement = sa.select(table).order_by(*table.primary_key)
        result = source.execution_options(yield_per=_ROWS_AT_A_TIME).execute(statement)
        for rows in result.mappings().partitions():
            target.execute(sa.insert(table), [dict(row) for row in rows])


def prepare(rebuilt: Path, made_at: datetime) -> None:
    """Take out of rebuilt records what must not come back, and leave a notice for the operator."""
    with closing(_open(rebuilt)) as database, database.engine.begin() as connection:
        # The operator's decision was about peers that were unknown at that time.
        connection.execute(sa.update(hubs).values(decision=None, decision_basis=None))
        text = (
            f"the records were restored from a backup of {made_at:%Y-%m-%d %H:%M:%S} UTC: credentials that "
            "were revoked since work again"
        )
        at = datetime.now(UTC)
        for hub in connection.scalars(sa.select(hubs.c.id)).all():
            connection.execute(sa.insert(notices), {"at": at, "text": text, "hub": hub})
    _finish(rebuilt)


def replace_rows(rebuilt: Path, database: Database) -> None:
    """Put rebuilt records in the place of those in PostgreSQL, in one transaction; raise BackupError."""
    try:
        with (
            closing(_open(rebuilt)) as source,
            source.engine.connect() as rows,
            database.engine.begin() as target,
            without_timeouts(target),
        ):
            _empty(target)
            _copy_rows(rows, target)
            for table in metadata.sorted_tables:
                _set_sequence(target, table)
    except SQLAlchemyError as exc:
        raise BackupError(f"the records in {database.name} can't be replaced ({said(exc)})") from exc


def _set_sequence(target: sa.Connection, table: sa.Table) -> None:
    """Set the sequence, so that the next row gets a higher number than all that were copied."""
    column = table.autoincrement_column
    if column is None:
        return
    name = target.scalar(sa.select(sa.func.pg_get_serial_sequence(table.name, column.name)))
    highest = target.scalar(sa.select(sa.func.max(column)))
    if name is not None and highest is not None:
        target.execute(sa.select(sa.func.setval(sa.cast(name, REGCLASS), highest)))


def _revision(database: Database) -> str:
    with database.engine.connect() as connection:
        return str(connection.scalar(sa.text(f"SELECT version_num FROM {_REVISION}")))  # noqa: S608 - ours


def _open(path: Path) -> Database:
    return Database(f"sqlite:///{quote(str(path))}", exclusive=False, copies=path.parent)


def _new_database(path: Path) -> Database:
    database = _open(path)
    try:
        database.migrate()
    except BaseException:
        database.close()
        raise
    return database


def _finish(path: Path) -> None:
    """Make the copy one durable file, without a write-ahead log."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE").close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
