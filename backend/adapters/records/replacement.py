"""Replaces the records with others, while no service runs."""

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Final

import sqlalchemy as sa

from backend.adapters.records.copies import replace_rows
from backend.adapters.records.database import Database
from backend.adapters.records.sqlite import SqliteFile
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import BackupError, ProvisioningError, StartRefusedError
from backend.services.hub.staged_file import sync_directory

# What SQLite may have beside the database's file.
_BESIDE: Final = ("-wal", "-shm", "-journal")


def parts_of(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the suffix and the path of each file of a SQLite database."""
    real = Path(os.path.realpath(path))
    for end in ("", *_BESIDE):
        part = Path(f"{real}{end}")
        if part.is_file() and part.stat().st_size:
            yield end, part


def require_file(url: str) -> None:
    """Raise BackupError where a SQLite file isn't there or empty: opening it would make an empty database.

    Raises OSError where that can't be found out.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        path = Path(parsed.database).absolute()
        if not any(parts_of(path)):
            raise BackupError(
                f"there are no records at {path}, so there is nothing to back up; start the service first, "
                "or name its STATE_DIRECTORY or DATABASE_URL"
            )


def replace_file(path: Path, new: Path) -> None:
    """Put a copy of `new` in the place of the database at `path`; raise BackupError or OSError.

    After a kill at any moment the path has the old database or the new one, whole.
    """
    real = Path(os.path.realpath(path))
    staged = real.with_name(f".{real.name}.new")
    try:
        with new.open("rb") as content:
            write_private(content, staged, like=real)
        # Before the rename: SQLite would take the old write-ahead log for the new database's.
        _fold(real)
        staged.replace(real)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(real.parent)


def write_private(source: IO[bytes], target: Path, like: Path | None = None) -> None:
    """Write a durable copy of a file, 0600, over what a killed process has left; raise OSError.

    It gets the owner of `like`, if that exists.
    """
    target.unlink(missing_ok=True)
    descriptor = os.open(
        target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR
    )
    with os.fdopen(descriptor, "wb") as file:
        if like is not None and like.exists():
            owner = like.stat()
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(descriptor)


def write_new(source: IO[bytes], target: Path) -> None:
    """Write a durable copy of a file, 0600, under its name only when it is whole; raise OSError."""
    staged = target.with_name(f".{target.name}.tmp")
    try:
        write_private(source, staged)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(target.parent)


def _fold(real: Path) -> None:
    """Make the database one file: write its write-ahead log into it, and delete that."""
    if not real.is_file() or not real.stat().st_size:
        left = [part for _, part in parts_of(real)]
    else:
        left = _fold_whole(real)
    for part in left:
        # Left only of a database that can't be read. It was saved as plain copies before.
        part.unlink()


def _fold_whole(real: Path) -> list[Path]:
    try:
        with closing(sqlite3.connect(real, timeout=0, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE").fetchone()
    except sqlite3.OperationalError as exc:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise BackupError(f"another program has the database {real} open; close it first") from exc
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise BackupError(f"the database {real} can't be replaced ({exc})") from exc
    except sqlite3.DatabaseError:
        pass
    return [part for end, part in parts_of(real) if end]


def _require_readable(database: Database) -> None:
    """Raise StartRefusedError for rows that can't be read: they can't be saved as they are, as a file can."""
    try:
        database.migrate()
        SqlRecords(database).load()
    except (StartRefusedError, ProvisioningError, ValueError) as exc:
        raise StartRefusedError(
            f"the records in {database.name} can't be read, and so not be saved before they are replaced "
            f"({exc}); save them with pg_dump(1), and name an empty database in DATABASE_URL"
        ) from exc


class PresentRecords:
    """The records of a hub whose service doesn't run, kept from every other service until `close`.

    `database` is None where there are none, or where they can't be read: `problem` says why.
    """

    def __init__(self, url: str, copies: Path) -> None:
        """Lock the records; raise InUseError if a service runs, or StartRefusedError."""
        self.database: Database | None = None
        self.problem: str | None = None
        self._path: Path | None = None
        parsed = sa.make_url(url)
        with ExitStack() as stack:
            if parsed.get_backend_name() != "sqlite":
                self.database = stack.enter_context(closing(Database(url)))
                _require_readable(self.database)
            elif parsed.database:
                self._path = Path(parsed.database).absolute()
                file = stack.enter_context(closing(SqliteFile(self._path)))
                stack.enter_context(file.lock())
                self._open_file(url, copies, stack)
            self._stack = stack.pop_all()

    def _open_file(self, url: str, copies: Path, stack: ExitStack) -> None:
        if not any(self.files()):
            return
        try:
            with ExitStack() as failing:
                # Not exclusive: this object holds the lock itself.
                database = failing.enter_context(closing(Database(url, exclusive=False, copies=copies)))
                database.migrate()
                SqlRecords(database).load()
                stack.push(failing.pop_all())
        except (StartRefusedError, ProvisioningError, ValueError) as exc:
            self.problem = str(exc)
        else:
            self.database = database

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield the suffix and the path of each of SQLite's files; none for PostgreSQL."""
        if self._path is not None:
            yield from parts_of(self._path)

    def replace(self, rebuilt: Path) -> None:
        """Replace the records, all or none; raise BackupError or OSError."""
        if self._path is None:
            if self.database is not None:
                replace_rows(rebuilt, self.database)
            return
        if self.database is not None:
            # Open connections would go on to use the old file.
            self.database.engine.dispose()
        replace_file(self._path, rebuilt)

    def close(self) -> None:
        """Release the records, so that a service can start."""
        self._stack.close()
