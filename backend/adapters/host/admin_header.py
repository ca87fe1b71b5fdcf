"""`admin.header` in the state directory: an admin's credential for operators on the hub's own host."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from backend.models.access.credentials import Secret
from backend.models.trusted_paths import make_private_directory

log = logging.getLogger(__name__)

NAME: Final = "admin.header"
_MOST_BYTES: Final = 256


@contextmanager
def admin_header(directory: Path, secret: Secret) -> Iterator[None]:
    """Keep the file while the secret is valid: one line, a whole header, as `curl -H @FILE` takes it.

    If it can't be written, that is logged, and the service goes on: keys can be made by the command line,
    too.
    """
    path = directory / NAME
    line = f"Authorization: Bearer {secret.reveal()}\n".encode("ascii")
    try:
        make_private_directory(directory)
        _replace(path, line)
    except OSError as exc:
        consequence = "make a key with `python -m backend key create --role admin`"
        log.warning(
            "admin_header_not_written",
            extra={"path": path, "reason": exc.strerror, "consequence": consequence},
        )
    try:
        yield
    finally:
        # Another service with this state directory may have put its own there.
        with suppress(OSError):
            if _read(path) == line:
                path.unlink()


def _replace(path: Path, line: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        new.replace(path)
    except OSError:
        # There is a valid secret in it.
        new.unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)
