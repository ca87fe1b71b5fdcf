"""Reads the hub's file: where it is now, which version it is, and its bytes."""

import os
import stat
import time
from pathlib import Path
from typing import Final

from backend.errors import ConfigFileError
from backend.models.operator_commands import command

_ATTEMPTS: Final = 5
# A file system's clock ticks every 10 ms or more often, and two changes within a tick have the same time of
# modification: a version is known by its time only when that is well past.
_SETTLED_NS: Final = 50_000_000


# What tells one version of the file from another without reading it. Owner and mode count, too.
FileIdentity = tuple[int, ...]


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return which version of a file has this status."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_mode,
        status.st_uid,
        status.st_gid,
    )


class ConfigReader:
    """A file that an operator may edit, replace, chmod or turn into a symbolic link at any time."""

    def __init__(self, path: Path) -> None:
        self._given: Final = path.absolute()

    @property
    def path(self) -> Path:
        """The file itself, which is to be replaced: where a symbolic link leads to by now."""
        return self.look()[0]

    def look(self) -> tuple[Path, FileIdentity | None]:
        """Return `path` and which version is there now; None if there is none, or stat(2) fails."""
        path = self._given
        try:
            # One call where it is no link. Links among the directories make no difference.
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                path = Path(os.path.realpath(path))
                status = os.stat(path)  # noqa: PTH116 - called for each batch
        except OSError:
            return path, None
        return path, identity_of(status)

    def read(self) -> tuple[bytes, FileIdentity, bool]:
        """Return the file's bytes, which version that is, and whether its time tells it from the next.

        Raises ConfigFileError where there is no file, or none that can be read.
        """
        path = self.path
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                for _ in range(_ATTEMPTS):
                    now = time.time_ns()
                    before = os.fstat(file.fileno())
                    if not stat.S_ISREG(before.st_mode):
                        raise _not_a_file(path)
                    file.seek(0)
                    text = file.read()
                    # Otherwise the file is being written at this moment.
                    if identity_of(before) == identity_of(os.fstat(file.fileno())) and (
                        len(text) == before.st_size
                    ):
                        return text, identity_of(before), now - before.st_mtime_ns > _SETTLED_NS
        except FileNotFoundError:
            raise ConfigFileError(
                str(path),
                "the file doesn't exist",
                f"Put the hub's own back from a backup, or run {command('hub init')}, which takes the key "
                "from the interface while that lives, and makes a new one for a new hub only. If it is "
                "elsewhere, set WIREGUARD_CONFIG_PATH",
            ) from None
        except IsADirectoryError:
            raise _not_a_file(path) from None
        except OSError as exc:
            raise ConfigFileError(
                str(path),
                f"the file can't be read: {exc.strerror or type(exc).__name__}",
                "Let the service's user read and replace it",
            ) from exc
        raise ConfigFileError(
            str(path), "another program keeps writing into the file", "Wait until that is done"
        )


def _not_a_file(path: Path) -> ConfigFileError:
    return ConfigFileError(
        str(path), "it is not a regular file", "Set WIREGUARD_CONFIG_PATH to the hub's wg-quick file"
    )


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a named pipe would otherwise wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
