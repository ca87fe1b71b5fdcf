"""A small file beside wg0.conf with the generation that the hub has reached.

Records with a lower generation are older than the hub, as from a backup.
"""

import json
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backend.models.access.audit import GENESIS

log = logging.getLogger(__name__)

# The file always has this length, so one write(2) overwrites it in place, and it is never empty.
_BYTES: Final = 256
# Beyond what any hub reaches, and well within what databases take.
_HIGHEST: Final = 2**62


@dataclass(frozen=True, slots=True)
class Mark:
    """The highest generation that the hub has reached, and the audit log's last row at about that time."""

    generation: int = 0
    audit_sequence: int = 0
    audit_hash: str = GENESIS


class HubMark:
    """Reads and writes the file. It isn't synced: after a power cut it may have an earlier generation."""

    def __init__(self, config_path: Path) -> None:
        self.path: Final = config_path.with_name(f".{config_path.name}.mark")
        self._written: Mark | None = None
        self._complained = False

    def read(self) -> Mark:
        """Return the mark; one that isn't there or can't be read is that of a new hub."""
        try:
            return _parse(self._read())
        except FileNotFoundError:
            return Mark()
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
            log.warning("mark_unreadable", extra={"path": self.path, "reason": type(exc).__name__})
            return Mark()

    def write(self, mark: Mark) -> None:
        """Write the mark. A failure is logged once and raises nothing."""
        if mark == self._written:
            return
        line = json.dumps(
            {
                "generation": mark.generation,
                "audit_sequence": mark.audit_sequence,
                "audit_hash": mark.audit_hash,
            }
        )
        try:
            self._overwrite(f"{line:<{_BYTES - 1}}\n".encode("ascii"))
        except OSError as exc:
            if not self._complained:
                log.warning("mark_not_written", extra={"path": self.path, "reason": exc.strerror})
            self._complained = True
        else:
            self._written, self._complained = mark, False

    def _read(self) -> bytes:
        # Neither a link nor a named pipe, and no more than a mark has.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is not a regular file")
            return os.pread(descriptor, _BYTES + 1, 0)
        finally:
            os.close(descriptor)

    def _overwrite(self, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, stat.S_IRUSR | stat.S_IWUSR)
        try:
            os.pwrite(descriptor, line, 0)
            # What stood there may have been anything.
            if os.fstat(descriptor).st_size != _BYTES:
                os.ftruncate(descriptor, _BYTES)
        finally:
            os.close(descriptor)


def _parse(text: bytes) -> Mark:
    found = json.loads(text)
    generation, sequence, own_hash = (found[name] for name in ("generation", "audit_sequence", "audit_hash"))
    if not (isinstance(generation, int) and isinstance(sequence, int) and isinstance(own_hash, str)):
        raise TypeError("it doesn't have two numbers and a hash")
    if not (0 <= generation < _HIGHEST and 0 <= sequence < _HIGHEST and len(own_hash) == len(GENESIS)):
        raise ValueError("its numbers or its hash can't be")
    return Mark(generation, sequence, own_hash)
