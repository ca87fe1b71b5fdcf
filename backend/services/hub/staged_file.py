"""A file that is to replace another one: written and synced beside it, and then put in its place at once."""

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

from backend.services.hub.config_reader import FileIdentity

# What `_make_temporary` puts behind the name, as tempfile does.
_TEMPORARY: Final = re.compile(r"\.[a-z0-9_]{8}\.tmp\Z")
_ATTEMPTS: Final = 100


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
    # Done when its content is durable.
    _synced: Future[None] = field(repr=False)

    def replace(self) -> bool:
        """Put the new version in the old one's place, unless that isn't what it was; raise OSError.

        The change is durable once the directory is synced. The temporary name is gone in any case.
        """
        try:
            self._synced.result()
            # Not followed: a link that has just taken its place would be replaced.
            if FileIdentity.of(os.lstat(self.path)) == self._expected:
                os.replace(self.temporary, self.path)  # noqa: PTH105 - called for each batch
                return True
        except FileNotFoundError:
            # The file is being replaced in two steps, or was taken away: the next look tells.
            pass
        except BaseException:
            self.discard()
            raise
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
        synced = _sync(descriptor, executor)
    except BaseException as exc:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(exc, FileNotFoundError):
            return None
        raise
    staged = StagedFile(path, temporary, identity, settled, expected, synced)
    if FileIdentity.of(old) != expected:
        staged.discard()
        return None
    return staged


def _make_temporary(path: Path) -> tuple[int, Path]:
    """Make an empty file beside `path`, for its owner alone; raise OSError.

    For each batch: tempfile.mkstemp takes several times as long.
    """
    for _ in range(_ATTEMPTS):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with suppress(FileExistsError):
            return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), temporary
    raise FileExistsError(errno.EEXIST, "all names for a temporary file are taken", str(path.parent))


def _fill(descriptor: int, path: Path, text: bytes) -> tuple[os.stat_result, FileIdentity, bool]:
    """Write a file with the owner and mode of `path`; return what that was, and what it is now."""
    try:
        old = path.stat()
        # Ownership first: changing it may take mode bits away.
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
        view = memoryview(text)
        while view:
            view = view[os.write(descriptor, view) :]
        settled = _mark(descriptor)
        return old, FileIdentity.of(os.fstat(descriptor)), settled
    except BaseException:
        os.close(descriptor)
        raise


def _sync(descriptor: int, executor: Executor | None) -> Future[None]:
    """Make a file's content durable, here or by the executor, and close it."""

    def sync() -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    if executor is not None:
        return executor.submit(sync)
    sync()
    synced: Future[None] = Future()
    synced.set_result(None)
    return synced


def sync_directory(directory: Path) -> None:
    """Make durable what was renamed in a directory; raise OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_directory(path: Path, size: int) -> None:
    """Find out whether `path` could be replaced by a file of `size` bytes; raise OSError where it can't.

    Asks for the room itself (posix_fallocate(3)): quotas and reserved blocks don't show in statvfs(3).
    """
    # An immutable file can't be replaced either, and says so when it's opened. Its mode doesn't matter: what
    # is replaced is the directory's entry.
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


def _mark(descriptor: int) -> bool:
    """Give a file a time of modification that no later change can have; return whether that could be done.

    A nanosecond after the clock's tick: a change within that tick brings it back to the tick, a later change
    to a later one.
    """
    moment = os.fstat(descriptor).st_mtime_ns + 1
    with suppress(OSError):
        os.utime(descriptor, ns=(moment, moment))
    return os.fstat(descriptor).st_mtime_ns == moment
