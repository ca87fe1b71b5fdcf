"""The file of a SQLite database: whether what the service has open is still what stands under its path."""

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Final

from backend.errors import RecordsUnavailableError

_DESCRIPTORS: Final = Path("/proc/self/fd")
# What Linux appends to the name of an open file that has none any more (proc_pid_fd(5)).
_DELETED: Final = " (deleted)"


class DatabaseFile:
    """A file and its path, from the start to `close`.

    SQLite goes on to work with a file that was moved or deleted, and every commit to it succeeds; the next
    start finds another one. So whether the two still belong together is asked after each commit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # O_PATH: to close any other descriptor of the file would drop the locks that SQLite has on it, which
        # belong to the process (fcntl(2)).
        self._descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self._identity = (status.st_dev, status.st_ino)
        # SQLite names the write-ahead log after the file itself, wherever a link to it is.
        self._real_path = Path(os.path.realpath(path))
        self._wal = f"{self._real_path}-wal"
        # The write-ahead log that was last found to be what SQLite has open.
        self._wal_identity: tuple[int, int] | None = None

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def check(self) -> None:
        """Raise RecordsUnavailableError, with what to do, unless the path leads to the file."""
        try:
            there = os.stat(self._path)  # noqa: PTH116 - twice a batch: a Path takes three times as long
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError | NotADirectoryError):
                problem = (
                    f"the database {self._path} can't be looked at ({exc.strerror}); let this process do so"
                )
                raise RecordsUnavailableError(problem) from exc
        else:
            if (there.st_dev, there.st_ino) == self._identity:
                self._check_wal()
                return
            raise RecordsUnavailableError(self._replaced())
        raise RecordsUnavailableError(self._missing())

    def _check_wal(self) -> None:
        try:
            status = os.stat(self._wal)  # noqa: PTH116 - as above
        except OSError:
            identity = None
        else:
            identity = (status.st_dev, status.st_ino)
            if identity == self._wal_identity:
                return
        if self._open(self._wal + _DELETED):
            raise RecordsUnavailableError(
                f"the write-ahead log {self._wal} was deleted under the running service; restart it, "
                "never with SIGKILL: as it stops, it writes what the log holds into the database"
            )
        self._wal_identity = identity

    def _missing(self) -> str:
        if self._is_deleted():
            return (
                f"the database {self._path} was deleted under the running service, and is lost when that "
                f"stops; put it back first, as root: `{self._rescue()}`, then restart the service"
            )
        return (
            f"the database {self._path} was moved under the running service, to {self._place()}; move it "
            "back, with its -wal and -shm"
        )

    def _replaced(self) -> str:
        another = f"{self._path} is another file than the database that the service has open"
        if self._is_deleted():
            return (
                f"{another}, which was deleted; restart the service to use the one that is there, or before "
                f"that put the deleted one back in its place, as root: `{self._rescue()}`"
            )
        return (
            f"{another}, which is {self._place()} now; move that one back, with its -wal and -shm, or "
            "restart the service to use the one that is there"
        )

    def _is_deleted(self) -> bool:
        return os.fstat(self._descriptor).st_nlink == 0

    def _place(self) -> str:
        return str((_DESCRIPTORS / str(self._descriptor)).readlink())

    def _rescue(self) -> str:
        """Return the command that copies what was deleted, with its write-ahead log, out of this process."""
        wal = f"{self._real_path}-wal"
        copies = [
            (self._descriptor, self._real_path),
            *((number, wal) for number in self._open(wal + _DELETED)[:1]),
        ]
        commands = [f"cp -p /proc/{os.getpid()}/fd/{number} {shlex.quote(str(to))}" for number, to in copies]
        if not self._real_path.parent.exists():
            commands.insert(0, f"mkdir -m 0700 -p {shlex.quote(str(self._real_path.parent))}")
        return " && ".join(commands)

    def _open(self, name: str) -> list[int]:
        """Return this process's descriptors of what has that name."""
        found = []
        for descriptor in _DESCRIPTORS.iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()) == name:
                    found.append(int(descriptor.name))
        return found
