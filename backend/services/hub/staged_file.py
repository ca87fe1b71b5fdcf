"""A file that is to replace another one: written and synced beside it, then renamed to its name."""

import errno
import os
import re
import secrets
import stat
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from backend.services.hub.config_reader import FileIdentity, identity_of

# What `_make_temporary` puts behind the name, as tempfile does.
_TEMPORARY: Final = re.compile(r"\.[a-z0-9_]{8}\.tmp\Z")


@dataclass(frozen=True, slots=True)
class StagedFile:
    """The new version under a temporary name, with the owner and mode of the old one.

    Made by `stage_file`. Either `replace` or `discard` has to be called.
    """

    path: Path
    temporary: Path
    # The new version's, and whether its time of modification tells it from every later one.
    identity: FileIdentity
    settled: bool
    _expected: FileIdentity = field(repr=False)
    # Done when its content is durable; None where it is already.
    _synced: Future[None] | None = field(repr=False)

    def replace(self) -> bool:
        """Put the new version in the old one's place, unless that isn't what it was; raise OSError.

        The change is durable once the directory is synced. The temporary name is gone in any case.
        """
        try:
            if self._synced is not None:
                self._synced.result()
            # Not followed: a link that has just taken its place would be replaced.
            if identity_of(os.lstat(self.path)) == self._expected:
                os.replace(self.temporary, self.path)  # noqa: PTH105 - called for each batch
                return True
        except FileNotFoundError:
            # Another program is replacing the file in two steps, or has deleted it.
            pass
        finally:
            self.discard()
        return False

    def discard(self) -> None:
        """Take the temporary file away, if it's still there."""
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def stage_file(
    path: Path, text: bytes, expected: FileIdentity, executor: Executor | None = None
) -> StagedFile | None:
    """Write and sync what is to replace `path`; raise OSError.

    With an executor it is synced there, and `replace` waits for that. None, and nothing is left, if the file
    isn't `expected` any more.
    """
    descriptor, temporary = _make_temporary(path)
    try:
        old, identity, settled = _fill(descriptor, path, text)
        synced = None if executor is None else executor.submit(_sync, descriptor)
        if synced is None:
            _sync(descriptor)
    except BaseException as exc:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(exc, FileNotFoundError):
            return None
        raise
    staged = StagedFile(path, temporary, identity, settled, expected, synced)
    if old != expected:
        staged.discard()
        return None
    return staged


def _make_temporary(path: Path) -> tuple[int, Path]:
    """Make an empty file beside `path`, for its owner alone; raise OSError.

    Called for each batch: tempfile.mkstemp takes several times as long.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), temporary


def _fill(descriptor: int, path: Path, text: bytes) -> tuple[FileIdentity, FileIdentity, bool]:
    """Write a file with the owner and mode of `path`.

    Returns which version `path` is, which one the new file is, and whether its time of modification tells it
    from every later one: it is set to a nanosecond after the clock's tick. A change within that tick brings
    it back to the tick, a later change to a later one. Without that, each batch would read the file again.
    """
    try:
        old = path.stat()
        # Ownership first: changing it may take mode bits away.
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
        view = memoryview(text)
        while view:
            view = view[os.write(descriptor, view) :]
        moment = os.fstat(descriptor).st_mtime_ns + 1
        with suppress(OSError):
            os.utime(descriptor, ns=(moment, moment))
        new = os.fstat(descriptor)
        return identity_of(old), identity_of(new), new.st_mtime_ns == moment
    except BaseException:
        os.close(descriptor)
        raise


def _sync(descriptor: int) -> None:
    """Make a file's content durable, and close it."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make durable what was renamed in a directory; raise OSError."""
    _sync(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def try_directory(path: Path, size: int) -> None:
    """Check that `path` could be replaced by a file of `size` bytes; raise OSError if it couldn't.

    Allocates the room (posix_fallocate(3)): quotas and reserved blocks don't show in statvfs(3).
    """
    # An immutable file can't be replaced either, and open(2) says so. Its mode doesn't matter: a rename
    # replaces the directory's entry.
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except PermissionError as exc:
        if exc.errno != errno.EACCES:
            raise
    descriptor, temporary = _make_temporary(path)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def temporaries(path: Path) -> list[Path]:
    """Return the files beside `path` that were to replace it, by their names; raise OSError."""
    return [other for other in path.parent.iterdir() if _TEMPORARY.sub("", other.name) == f".{path.name}"]
