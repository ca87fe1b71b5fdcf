"""SQLite: how its connections are set up, the file that the service has open, and a copy of it."""

import logging
import os
import shlex
import sqlite3
import sys
import time
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from backend.adapters.host.locks import lock_file
from backend.errors import RecordsUnavailableError, StartRefusedError
from backend.models.trusted_paths import make_private_directory, require_trusted, require_trusted_file
from backend.services.hub.staged_file import sync_directory

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS: Final = 30_000
_BUSY_POLL_SECONDS: Final = 0.005
# How long a connection is used that SQLite could open for reading only.
_READ_ONLY_SECONDS: Final = 0.5
_READ_ONLY_SINCE: Final = "read only since"
# A batch with its workflow, and the write-ahead log when it's checkpointed.
_ROOM_BYTES: Final = 4 * 1024 * 1024
_COPIES_KEPT: Final = 3
_DESCRIPTORS: Final = Path("/proc/self/fd")
# What Linux appends to the name of an open file that has none any more (proc_pid_fd(5)).
_DELETED: Final = " (deleted)"


def open_memory() -> sa.Engine:
    """Open a database that lives as long as the engine."""
    # One connection, shared in turn: a second one would open another, empty database.
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
    """Switch to WAL mode; wait for other connections up to the busy timeout.

    SQLite itself doesn't wait where the database is new and another connection is about to write to it.
    """
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as exc:
            if _primary_code(exc) != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(_BUSY_POLL_SECONDS)
        else:
            return


def _primary_code(exc: BaseException) -> int:
    # The lower byte (https://www.sqlite.org/rescode.html).
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF


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
    return _primary_code(exc) == sqlite3.SQLITE_READONLY


def drop_read_only(_connection: object, record: sa.pool.ConnectionPoolEntry, _proxy: object) -> None:
    """Replace a connection that has been read-only for a moment.

    SQLite silently opens a connection read-only where the file can't be opened for writing at that moment,
    and the connection would stay read-only.
    """
    opened_at = record.info.get(_READ_ONLY_SINCE)
    if opened_at is not None and time.monotonic() - opened_at > _READ_ONLY_SECONDS:
        raise sa.exc.DisconnectionError


def _unixepoch(_modifier: str) -> float:
    return round(time.time(), 3)


class SqliteFile:
    """The database's file and its path, from the start to `close`.

    SQLite goes on to work with a file that was moved or deleted, and every commit to it succeeds; the next
    start finds another one. So whether the two still belong together is asked after each commit.
    """

    def __init__(self, path: Path) -> None:
        """Make the file where there is none, 0600; raise StartRefusedError."""
        self._path = path
        try:
            make_private_directory(path.parent)
            require_trusted_file(path, f"the database {path} (DATABASE_URL, or STATE_DIRECTORY)")
            # From birth: SQLite gives its -wal and -shm the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            # SQLite names what belongs to the file after the file itself, wherever a link to it is.
            self._real_path = Path(os.path.realpath(path))
            self._wal = f"{self._real_path}-wal"
            for made in (self._real_path, Path(self._wal), Path(f"{self._real_path}-shm")):
                with suppress(FileNotFoundError):
                    made.chmod(0o600)
        except OSError as exc:
            raise StartRefusedError(
                f"the database {path} can't be made or written ({exc.strerror}); "
                "give this process a STATE_DIRECTORY or a DATABASE_URL that it may write to"
            ) from exc
        # O_PATH: to close any other descriptor of the file would drop the locks that SQLite has on it, which
        # belong to the process (fcntl(2)).
        self._descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self._identity = (status.st_dev, status.st_ino)
        # The write-ahead log that was last found to be what SQLite has open.
        self._wal_identity: tuple[int, int] | None = None

    def lock(self) -> FileIO:
        """Keep other services from the file until what this returns is closed; raise StartRefusedError."""
        if self._real_path.stat().st_nlink != 1:
            raise StartRefusedError(
                f"the database {self._path} has another name too, by which a second service could write to "
                f"it; `find / -xdev -samefile {shlex.quote(str(self._real_path))}` shows all its names; "
                "leave it one"
            )
        # Beside the file itself, whichever link led to it: two services would undo each other's work.
        return lock_file(Path(f"{self._real_path}.lock"), f"The database {self._path}")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def has_room(self) -> bool:
        """Say whether its disk takes more."""
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize >= _ROOM_BYTES

    def check(self) -> None:
        """Raise RecordsUnavailableError, with what to do, unless the path leads to the file."""
        try:
            there = os.stat(self._path)  # noqa: PTH116 - twice a batch: a Path takes three times as long
        except (FileNotFoundError, NotADirectoryError):
            raise RecordsUnavailableError(self._missing()) from None
        except OSError as exc:
            raise RecordsUnavailableError(
                f"the database {self._path} can't be looked at ({exc.strerror}); let this process do so"
            ) from exc
        if (there.st_dev, there.st_ino) != self._identity:
            raise RecordsUnavailableError(self._replaced())
        self._check_wal()

    def _check_wal(self) -> None:
        try:
            status = os.stat(self._wal)  # noqa: PTH116 - as above
            identity = (status.st_dev, status.st_ino)
            if identity == self._wal_identity:
                return
        except OSError:
            identity = None
        if self._deleted_wals():
            raise RecordsUnavailableError(
                f"the write-ahead log {self._wal} was deleted under the running service; restart it, "
                "never with SIGKILL: as it stops, it writes what the log holds into the database"
            )
        self._wal_identity = identity

    def _missing(self) -> str:
        place = self._place()
        if place is None:
            return (
                f"the database {self._path} was deleted under the running service, and is lost when that "
                f"stops; put it back first, as root: `{self._rescue()}`, then restart the service"
            )
        return (
            f"the database {self._path} was moved under the running service, to {place}; move it "
            "back, with its -wal and -shm"
        )

    def _replaced(self) -> str:
        another = f"{self._path} is another file than the database that the service has open"
        place = self._place()
        if place is None:
            return (
                f"{another}, which was deleted; restart the service to use the one that is there, or before "
                f"that put the deleted one back in its place, as root: `{self._rescue()}`"
            )
        return (
            f"{another}, which is {place} now; move that one back, with its -wal and -shm, or "
            "restart the service to use the one that is there"
        )

    def _place(self) -> Path | None:
        """Return where the file is now; None where it was deleted."""
        if os.fstat(self._descriptor).st_nlink == 0:
            return None
        return (_DESCRIPTORS / str(self._descriptor)).readlink()

    def _rescue(self) -> str:
        """Return the command that copies what was deleted, with its write-ahead log, out of this process."""
        copies: list[tuple[int, object]] = [(self._descriptor, self._real_path)]
        copies += [(number, self._wal) for number in self._deleted_wals()[:1]]
        commands = [f"cp -p /proc/{os.getpid()}/fd/{number} {shlex.quote(str(to))}" for number, to in copies]
        if not self._real_path.parent.exists():
            commands.insert(0, f"mkdir -m 0700 -p {shlex.quote(str(self._real_path.parent))}")
        return " && ".join(commands)

    def _deleted_wals(self) -> list[int]:
        """Return this process's descriptors of a write-ahead log that was deleted."""
        found = []
        for descriptor in _DESCRIPTORS.iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()) == self._wal + _DELETED:
                    found.append(int(descriptor.name))
        return found


def copy_before_migration(source: sqlite3.Connection, revision: str, directory: Path) -> None:
    """Write before-<revision>.sqlite, 0600, and keep the last three; raise StartRefusedError.

    The copy is whole or not there, and includes what is still in the write-ahead log.
    """
    require_trusted(directory, "STATE_DIRECTORY")
    copy = directory / f"before-{revision}.sqlite"
    temporary = directory / f".{copy.name}.tmp"
    try:
        make_private_directory(directory)
        temporary.unlink(missing_ok=True)
        # Before SQLite opens it, which would make it with the umask's mode.
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(temporary)) as target:
            source.backup(target)
            # One file, without a write-ahead log beside it.
            target.execute("PRAGMA journal_mode=DELETE").close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(copy)
        sync_directory(directory)
        copies = sorted(directory.glob("before-*.sqlite"), key=lambda made: made.stat().st_mtime_ns)
        for old in copies[:-_COPIES_KEPT]:
            old.unlink()
    except (OSError, sqlite3.Error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise StartRefusedError(
            f"{copy} can't be written ({reason}), and without that copy the schema isn't changed; "
            f"make room for it in {directory}, and let this process write there"
        ) from exc
    finally:
        temporary.unlink(missing_ok=True)
    log.info("database_copied", extra={"path": copy})
