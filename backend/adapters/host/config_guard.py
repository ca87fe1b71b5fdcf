"""Locks the hub's config, and refuses one that other users could change, wherever a link leads to."""

import logging
import os
import stat
from pathlib import Path
from typing import Final, Self

from backend.adapters.host.lock_file import LockFile
from backend.errors import ConfigFileError, StartRefusedError
from backend.models.trusted_paths import problem_with_file

log = logging.getLogger(__name__)


class ConfigGuard:
    """Held for as long as the config is managed: a lock beside each place where it was.

    The config may become a link to another place while it is managed, where another process may manage it by
    that name. So each place gets a lock of its own before the file there is used, and all are kept to the
    end.
    """

    def __init__(self, config_path: Path) -> None:
        self._given: Final = config_path
        self._locks: dict[Path, LockFile] = {}
        # The mode that the last warning was about.
        self._warned: int | None = None

    def __enter__(self) -> Self:
        """Take the lock beside the config; raise StartRefusedError where another process has it."""
        self._lock(Path(os.path.realpath(self._given)))
        return self

    def __exit__(self, *exc: object) -> None:
        """Release every lock."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    def require_trusted(self, path: Path) -> None:
        """Raise ConfigFileError where the file at `path` must not be used; warn where others may read it."""
        problem = problem_with_file(self._given)
        if problem is not None:
            raise ConfigFileError(
                str(path),
                f"it is within other users' reach: {problem}",
                "Look at what is in it before you trust it again",
            )
        try:
            self._lock(Path(os.path.realpath(path)))
        except StartRefusedError as exc:
            raise ConfigFileError(str(path), str(exc), "Until then the file is left as it is") from exc
        self._warn_of_readers(path)

    def _lock(self, path: Path) -> None:
        if path not in self._locks:
            lock = LockFile(path.with_name(f".{path.name}.lock"), f"The hub's config {self._given}")
            self._locks[path] = lock.acquire()

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
