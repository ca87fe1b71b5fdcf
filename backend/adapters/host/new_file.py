"""The file that a command writes for the user who typed it: a secret, an export of the audit log."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from backend.errors import StartRefusedError


@contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """Make a file for its owner alone, and have it on the disk at the end; raise StartRefusedError.

    It is removed where the `with` block or the disk fails. The messages name the option `--output`.
    """
    try:
        # O_EXCL: what an existing file holds would be lost, whether the path names it or a link to it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StartRefusedError(f"--output: {path} can't be made ({exc.strerror}); name a new file") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
    except BaseException as exc:
        path.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise StartRefusedError(f"--output: {path} can't be written ({exc.strerror})") from None
        raise
