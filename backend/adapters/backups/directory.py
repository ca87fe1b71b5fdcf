"""The directory of the archives, and the scratch directory in which they are made and verified.

A lock lets one process at a time make, verify or restore a backup. So whatever it finds in the scratch
directory was left by a process that was killed, and is deleted.
"""

import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Final

from backend.adapters.backups.archive import manifest_of
from backend.adapters.host.locks import lock_file
from backend.errors import BackupError, InUseError
from backend.models.backups import Manifest, Origin
from backend.models.trusted_paths import make_private_directory, require_trusted
from backend.services.hub.backups import Backup
from backend.services.hub.staged_file import sync_directory

_SUFFIX: Final = ".tar.gz"
# Origin, moment and generation. No other file in the directory is ever deleted.
_NAME: Final = re.compile(
    rf"({'|'.join(Origin)})-([0-9]{{8}}T[0-9]{{6}}\.[0-9]{{3}}Z)-g[0-9]+{re.escape(_SUFFIX)}"
)
# How long a process waits for the lock: seconds.
_PATIENCE_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1


def stamp(moment: datetime) -> str:
    """Return a time, to the millisecond, as it is written in the archives' names."""
    utc = moment.astimezone(UTC)
    return f"{utc:%Y%m%dT%H%M%S}.{utc.microsecond // 1000:03d}Z"


class BackupDirectory:
    """The archives in the directory `path`. The lock and the scratch directory are in `state`."""

    def __init__(self, path: Path, state: Path) -> None:
        self.path: Final = path
        # Always the same name, so that the next process finds and deletes what a killed one has left. It is
        # made from `state`, because several hubs may share the directory.
        self.temporary: Final = path / f".{sha256(bytes(state)).hexdigest()[:16]}.tmp"
        self.state: Final = state

    @contextmanager
    def locked_scratch(self, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[Path]:
        """Hold the lock, and yield an empty scratch directory, which is deleted at the end.

        Raises InUseError if another process holds the lock for longer, StartRefusedError, or OSError.
        """
        require_trusted(self.state, "STATE_DIRECTORY")
        make_private_directory(self.state)
        scratch = self.state / "backup.scratch"
        with closing(self._lock(patience_seconds)):
            self._sweep(scratch)
            scratch.mkdir(mode=0o700)
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def make(self) -> None:
        """Make the directory, 0700; raise StartRefusedError, which says what to do."""
        try:
            make_private_directory(self.path)
        except OSError as exc:
            raise BackupError(
                f"the directory {self.path} can't be made ({exc.strerror}); let this process make it, or set "
                "WIREGUARD_BACKUP_DIRECTORY to another one"
            ) from exc
        require_trusted(self.path, "WIREGUARD_BACKUP_DIRECTORY")

    def publish(self, manifest: Manifest) -> Path:
        """Give the verified archive at `temporary` its name, and return its path; raise OSError."""
        path = self.path / f"{manifest.origin}-{stamp(manifest.made_at)}-g{manifest.generation}{_SUFFIX}"
        self.temporary.replace(path)
        sync_directory(self.path)
        return path

    def names(self, until: datetime | None = None) -> list[str]:
        """Return the archives' names, the newest first, none made later than `until`; raise OSError."""
        last = "~" if until is None else stamp(until)
        try:
            found = [(_moment(entry.name), entry.name) for entry in self.path.iterdir()]
        except FileNotFoundError:
            return []
        return [name for moment, name in sorted(found, reverse=True) if moment and moment <= last]

    def backups(self) -> Sequence[Backup]:
        """Return the archives, the newest first, each with its manifest or why it can't be read."""
        return [backup for name in self.names() if (backup := self.read(name)) is not None]

    def read(self, name: str) -> Backup | None:
        """Return an archive of the directory; None if it was deleted meanwhile."""
        path = self.path / name
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        except OSError as exc:
            # Such as a link in a circle. The other archives are as good as before.
            return Backup(path, 0, None, f"it can't be looked at ({exc.strerror})")
        if not stat.S_ISREG(status.st_mode):
            return Backup(path, status.st_size, None, "it is no regular file")
        try:
            return Backup(path, status.st_size, manifest_of(path), None)
        except BackupError as exc:
            return Backup(path, status.st_size, None, str(exc))

    def find(self, given: Path) -> Path:
        """Return the path of an archive that is given by its path or by its name in the directory."""
        return self.path / given if _moment(str(given)) and not given.exists() else given

    def _lock(self, patience_seconds: float) -> FileIO:
        until = time.monotonic() + patience_seconds
        while True:
            try:
                return lock_file(self.state / "backup.lock", f"A backup in {self.state}")
            except InUseError:
                if time.monotonic() > until:
                    raise
                time.sleep(_POLL_SECONDS)

    def _sweep(self, scratch: Path) -> None:
        """Delete what a killed process has left."""
        if scratch.is_symlink():
            scratch.unlink()
        elif scratch.exists():
            shutil.rmtree(scratch)
        self.temporary.unlink(missing_ok=True)


def _moment(name: str) -> str:
    match = _NAME.fullmatch(name)
    return "" if match is None else match[2]
