"""SQLite: how its connections are set up, and which of them are not kept."""

import sqlite3
import sys
import time
from typing import Final

import sqlalchemy as sa

BUSY_TIMEOUT_MS: Final = 30_000
_BUSY_POLL_SECONDS: Final = 0.005
# How long a connection is used that SQLite could open for reading only.
_READ_ONLY_SECONDS: Final = 0.5
_READ_ONLY_SINCE: Final = "read only since"


def open_memory() -> sa.Engine:
    """Open a database that lives as long as the engine."""
    # One connection, for which its users wait: another one would be another database.
    engine = sa.create_engine(
        "sqlite://",
        poolclass=sa.QueuePool,
        pool_size=1,
        max_overflow=0,
        connect_args={"check_same_thread": False},
    )
    sa.event.listen(engine, "connect", prepare)
    return engine


def prepare(connection: sqlite3.Connection, record: sa.pool.ConnectionPoolEntry) -> None:
    """Set a new connection up."""
    if _is_read_only(connection):
        record.info[_READ_ONLY_SINCE] = time.monotonic()
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}").close()
    _use_write_ahead_log(connection)
    for pragma in (
        # An acknowledged peer survives a power cut: NORMAL would lose the last commits.
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()
    if sqlite3.sqlite_version_info < (3, 42) and sys.version_info >= (3, 12):
        # From Python 3.12 on, DBOS's schema asks for unixepoch('subsec'), which older SQLite answers with
        # NULL (Debian 12 has 3.40). The connection's own function stands in for the built-in one.
        connection.create_function("unixepoch", 1, _unixepoch)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Have the database's changes written ahead, waiting for others as long as for any of their locks.

    SQLite itself doesn't wait where the database is new and another connection is about to write to it.
    """
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as exc:
            if not _is_busy(exc) or time.monotonic() > until:
                raise
            time.sleep(_BUSY_POLL_SECONDS)
        else:
            return


def _is_busy(exc: sqlite3.OperationalError) -> bool:
    return exc.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def _is_read_only(connection: sqlite3.Connection) -> bool:
    connection.execute("PRAGMA busy_timeout=0").close()
    try:
        # SQLite makes a reading one of it, without a word, where it can do no other.
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("PRAGMA user_version=0").close()
    except sqlite3.OperationalError as exc:
        # Or another connection writes at this moment: then so can we.
        return refuses_writes(exc)
    finally:
        connection.rollback()
    return False


def refuses_writes(exc: BaseException) -> bool:
    """Say whether SQLite raised this because the database is for reading only."""
    # The lower byte is the primary code (https://www.sqlite.org/rescode.html).
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF == sqlite3.SQLITE_READONLY


def drop_read_only(_connection: object, record: sa.pool.ConnectionPoolEntry, _proxy: object) -> None:
    """Have a connection opened anew that is for reading only, and has been for a moment.

    SQLite opens it so, without a word, where the file can't be opened for writing at that moment; and so it
    would stay for as long as it lives.
    """
    opened_at = record.info.get(_READ_ONLY_SINCE)
    if opened_at is not None and time.monotonic() - opened_at > _READ_ONLY_SECONDS:
        raise sa.exc.DisconnectionError


def _unixepoch(_modifier: str) -> float:
    return round(time.time(), 3)
