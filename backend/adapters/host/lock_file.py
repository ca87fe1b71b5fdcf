"""Locks between processes that end with the process that holds them: flock(2), unix(7)."""

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Final, Self

from backend.errors import InUseError, StartRefusedError

_MODE: Final = 0o600
# O_NONBLOCK: a pipe or a device at the path is opened without a wait, and then refused.
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class LockFile:
    """A lock on a file, held from `acquire` to `release` or to the end of the process."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self._descriptor: int | None = None

    def acquire(self) -> Self:
        """Take the lock; raise StartRefusedError when another process has it."""
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise InUseError(
                f"{self._what} is already managed by another process (PID {holder}); stop that one first"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return self

    def _open(self) -> int:
        """Open the lock file; refuse a link, because `acquire` writes to what is opened."""
        try:
            descriptor = os.open(self._path, _FLAGS, _MODE)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise self._refused("is a symbolic link") from None
            raise StartRefusedError(
                f"{self._path} can't be made ({exc.strerror}); let this process write to its directory"
            ) from exc
        status = os.fstat(descriptor)
        problem = None
        if not stat.S_ISREG(status.st_mode):
            problem = "is not a regular file"
        elif status.st_nlink != 1:
            problem = "has another name too"
        if problem is not None:
            os.close(descriptor)
            raise self._refused(problem)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != _MODE:
            # Another program may have made it so: any user who can read the file can lock it, and keep us
            # from starting.
            os.fchmod(descriptor, _MODE)
        return descriptor

    def _refused(self, problem: str) -> StartRefusedError:
        return StartRefusedError(
            f"the lock file {self._path} {problem}, so the service didn't make it; find out who did, and "
            "remove it"
        )

    def release(self) -> None:
        """Release the lock. The file stays: otherwise a third process could lock a new file of that name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class InterfaceLock:
    """A lock on an interface: a UNIX socket that is bound to its name in the abstract namespace.

    That namespace belongs to the network namespace, as the interface does. So two processes meet there
    whatever the places of their configs.
    """

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._socket: socket.socket | None = None

    def acquire(self) -> Self:
        """Take the lock; raise InUseError when another process has it."""
        held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            held.bind(f"\0wireguard-provisioning/{self._interface}")
        except OSError as exc:
            held.close()
            if exc.errno != errno.EADDRINUSE:
                raise
            raise InUseError(
                f"interface {self._interface} is already managed by another process, with another config; "
                "stop that one first, or give this hub another name with WIREGUARD_CONFIG_PATH"
            ) from None
        self._socket = held
        return self

    def release(self) -> None:
        """Release the lock."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
