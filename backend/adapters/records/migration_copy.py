"""A copy of a SQLite database as it is before its schema is changed, for a way back."""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from backend.errors import StartRefusedError
from backend.models.trusted_paths import make_private_directory, require_trusted

log = logging.getLogger(__name__)

_KEPT: Final = 3


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
        _write(source, temporary)
        temporary.replace(copy)
        _sync(directory)
        _forget_old(directory)
    except (OSError, sqlite3.Error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise StartRefusedError(
            f"{copy} can't be written ({reason}), and without that copy the schema isn't changed; "
            f"make room for it in {directory}, and let this process write there"
        ) from exc
    finally:
        temporary.unlink(missing_ok=True)
    log.info("database_copied", extra={"path": copy})


def _write(source: sqlite3.Connection, path: Path) -> None:
    # Before SQLite opens it, which would make it with the umask's mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(sqlite3.connect(path)) as target:
        source.backup(target)
        # One file, without a write-ahead log beside it.
        target.execute("PRAGMA journal_mode=DELETE").close()
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget_old(directory: Path) -> None:
    copies = sorted(directory.glob("before-*.sqlite"), key=lambda copy: copy.stat().st_mtime_ns)
    for old in copies[:-_KEPT]:
        old.unlink()
