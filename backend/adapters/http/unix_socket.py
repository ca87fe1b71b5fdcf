"""Listens on a UNIX socket, whose path may have one that a dead process left."""

import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backend.adapters.host.locks import lock_file
from backend.errors import StartRefusedError
from backend.models.trusted_paths import require_trusted


@contextmanager
def listening_at(path: Path) -> Iterator[socket.socket]:
    """Listen at `path`, with mode 0600, and remove the socket at the end; raise StartRefusedError."""
    path = path.absolute()
    # A user who may write there could lead the lock file elsewhere, or replace our socket.
    require_trusted(path.parent, f"the directory of {path} (--unix-socket)")
    # Without the lock, of two processes that start at once the second could remove the first one's socket.
    with (
        lock_file(path.with_name(f".{path.name}.lock"), f"The socket {path}"),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        try:
            _remove_stale(path)
            listener.bind(str(path))
        except OSError as exc:
            raise StartRefusedError(
                f"{path} can't be listened on ({exc.strerror or exc}); choose another --unix-socket"
            ) from exc
        try:
            # Before a client can connect.
            path.chmod(0o600)
            listener.listen()
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise StartRefusedError(f"{path} is there already and is no socket; choose another --unix-socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A live process whose queue is full would keep us waiting.
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise StartRefusedError(
        f"{path} is listened on by another process; stop that one, or choose another --unix-socket"
    )
