"""Files for the eyes of their owner alone: a command's output, and `admin.header` in the state directory."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from backend.errors import StartRefusedError
from backend.models.access.credentials import Secret
from backend.models.trusted_paths import make_private_directory

log = logging.getLogger(__name__)

# An admin's credential for operators on the hub's own host.
ADMIN_HEADER: Final = "admin.header"
_MOST_BYTES: Final = 256


@contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """Make a file for the user who typed a command: a secret, an export of the audit log.

    The file is on the disk at the end, and removed where the `with` block or the disk fails. Raises
    StartRefusedError, whose messages name the option `--output`.
    """
    try:
        # What an existing file holds would be lost, whether the path names it or a link to it.
        file = _make(path)
    except OSError as exc:
        raise StartRefusedError(f"--output: {path} can't be made ({exc.strerror}); name a new file") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as exc:
        path.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise StartRefusedError(f"--output: {path} can't be written ({exc.strerror})") from None
        raise


@contextmanager
def admin_header(directory: Path, secret: Secret) -> Iterator[None]:
    """Keep the file while the secret is valid: one line, a whole header, as `curl -H @FILE` takes it.

    If it can't be written, that is logged, and the service goes on: keys can be made by the command line,
    too.
    """
    path = directory / ADMIN_HEADER
    line = f"Authorization: Bearer {secret.reveal()}\n"
    try:
        make_private_directory(directory)
        _replace(path, line)
    except OSError as exc:
        log.warning(
            "admin_header_not_written",
            extra={
                "path": path,
                "reason": exc.strerror,
                "consequence": "make a key with `python -m backend key create --role admin`",
            },
        )
    try:
        yield
    finally:
        # Another service with this state directory may have put its own there.
        with suppress(OSError):
            if _read(path) == line.encode():
                path.unlink()


def _make(path: Path) -> IO[str]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "w", encoding="utf-8")


def _replace(path: Path, line: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with _make(new) as file:
            file.write(line)
        new.replace(path)
    except OSError:
        # There is a valid secret in it.
        new.unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return file.read(_MOST_BYTES)
