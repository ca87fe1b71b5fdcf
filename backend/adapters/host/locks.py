"""Locks between processes, which end with the process that holds them: flock(2), unix(7).

Each function returns what holds the lock until it is closed: keep it. `ConfigGuard` does that for the config.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
from io import FileIO
from pathlib import Path
from typing import Final, Self

from backend.errors import ConfigFileError, InUseError, StartRefusedError
from backend.models.trusted_paths import problem_with_file

log = logging.getLogger(__name__)

_MODE: Final = 0o600
# O_NONBLOCK: a pipe or a device at the path is opened without a wait, and then refused.
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def lock_file(path: Path, what: str) -> FileIO:
    """Make a file and lock it; raise StartRefusedError, InUseError when another process has the lock.

    The file stays when it is closed: otherwise a third process could lock a new file of that name.
    """
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(32).decode("ascii", "replace").strip() or "unknown"
        file.close()
        raise InUseError(
            f"{what} is already managed by another process (PID {holder}); stop that one first"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    return file


def _open(path: Path) -> FileIO:
    """Open the lock file; refuse a link, because the file that is opened is written to."""
    try:
        file = FileIO(os.open(path, _FLAGS, _MODE), "r+")
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise _refused(path, "is a symbolic link") from None
        raise StartRefusedError(
            f"{path} can't be made ({exc.strerror}); let this process write to its directory"
        ) from exc
    status = os.fstat(file.fileno())
    is_regular = stat.S_ISREG(status.st_mode)
    if not is_regular or status.st_nlink != 1:
        file.close()
        raise _refused(path, "has another name too" if is_regular else "is not a regular file")
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != _MODE:
        # Another program may have made it so: any user who can read the file can lock it, and keep us from
        # starting.
        os.fchmod(file.fileno(), _MODE)
    return file


def _refused(path: Path, problem: str) -> StartRefusedError:
    return StartRefusedError(
        f"the lock file {path} {problem}, so the service didn't make it; find out who did, and remove it"
    )


def lock_interface(interface: str) -> socket.socket:
    """Take the sole right to write to an interface; raise InUseError when another process has it.

    The lock is a UNIX socket in the abstract namespace, which belongs to the network namespace, as the
    interface does. So two processes meet there whatever the places of their configs.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0wireguard-provisioning/{interface}")
    except OSError as exc:
        held.close()
        if exc.errno != errno.EADDRINUSE:
            raise
        raise InUseError(
            f"interface {interface} is already managed by another process, with another config; "
            "stop that one first, or give this hub another name with WIREGUARD_CONFIG_PATH"
        ) from None
    return held


class ConfigGuard:
    """Locks the hub's config, and refuses one that other users could change, wherever a link leads to.

    Held for as long as the config is managed: a lock beside each place where it was.

    The config may become a link to another place while it is managed, where another process may manage it by
    that name. So each place gets a lock of its own before the file there is used, and all are kept to the
    end.
    """

    def __init__(self, config_path: Path) -> None:
        self._given: Final = config_path
        self._locks: dict[Path, FileIO] = {}
        # The mode that the last warning was about.
        self._warned: int | None = None

    def __enter__(self) -> Self:
        """Take the lock beside the config; raise StartRefusedError where another process has it."""
        self._lock(self._given)
        return self

    def __exit__(self, *exc: object) -> None:
        """Release every lock."""
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    def require_trusted(self, path: Path) -> None:
        """Raise ConfigFileError where the file at `path` must not be used; warn where others may read it."""
        if problem := problem_with_file(self._given):
            raise ConfigFileError(
                str(path),
                f"it is within other users' reach: {problem}",
                "Look at what is in it before you trust it again",
            )
        try:
            self._lock(path)
        except StartRefusedError as exc:
            raise ConfigFileError(str(path), str(exc), "Until then the file is left as it is") from exc
        self._warn_of_readers(path)

    def _lock(self, path: Path) -> None:
        real = Path(os.path.realpath(path))
        if real not in self._locks:
            beside = real.with_name(f".{real.name}.lock")
            self._locks[real] = lock_file(beside, f"The hub's config {self._given}")

    def _warn_of_readers(self, path: Path) -> None:
        """Warn once of each mode that lets others read the private key, as wg-quick(8) does.

        The group may be there on purpose.
        """
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            return
        if not mode & (stat.S_IRGRP | stat.S_IROTH):
            self._warned = None
        elif mode != self._warned:
            self._warned = mode
            log.warning(
                "private_key_readable",
                extra={"path": path, "mode": f"{mode:04o}", "remedy": f"chmod go-r {path}"},
            )
