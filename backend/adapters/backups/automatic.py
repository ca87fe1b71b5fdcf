"""The service's own backups: made when they are due, and deleted when there are enough newer ones."""

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Final

from backend.adapters.backups.maker import BackupMaker, explained
from backend.models.backups import Manifest, Origin
from backend.services.hub.backups import HubVersion, Retention, expired, is_due
from backend.services.hub.config_reader import FileIdentity

log = logging.getLogger(__name__)


class AutomaticBackups:
    """Makes a backup when one is due. A loop calls `run` in a thread of its own; no request waits for it."""

    def __init__(
        self,
        maker: BackupMaker,
        hub_public_key: Callable[[], str],
        generation: Callable[[], int],
        retention: Retention,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._maker = maker
        self._reader = maker.reader
        self._hub_public_key = hub_public_key
        self._generation = generation
        self._retention: Final = retention
        self._clock = clock
        # The generation and the config file at the last run, and since when they have been the same.
        self._seen: tuple[int, FileIdentity | None] | None = None
        self._seen_since = clock()
        # The config file whose hash was computed last, and that hash.
        self._hashed: tuple[FileIdentity | None, str] = (None, "")
        self._lock = Lock()  # guards the newest backup: its name and its manifest
        self._newest: tuple[str, Manifest] | None = None
        # An error comes again in the first run, which reports it.
        with suppress(OSError):
            self._look()

    def last_backup_at(self) -> float | None:
        """Return when the newest backup was made, by time.time(); None if there is none."""
        with self._lock:
            return None if self._newest is None else self._newest[1].made_at.timestamp()

    def run(self) -> None:
        """Make a backup if one is due; raise ProvisioningError or BackupError."""
        seen = (self._generation(), self._reader.look()[1])
        if seen != self._seen:
            self._seen, self._seen_since = seen, self._clock()
        with explained(self._maker.directory.path):
            self._look()
        newest = None if self._newest is None else self._newest[1]
        quiet_seconds = self._clock() - self._seen_since
        if not is_due(
            newest, lambda: HubVersion(seen[0], self._hash(seen[1])), quiet_seconds, self._maker.now()
        ):
            return
        made = self._maker.make(Origin.AUTOMATIC)
        if made.manifest is not None:
            self._note(made.path.name, made.manifest)
        log.info("backup_made", extra={"path": made.path, "bytes": made.size})
        with explained(self._maker.directory.path):
            self._prune(made.path)

    def _look(self) -> None:
        """Find the newest backup of this hub, which a command may have made; raise OSError."""
        directory = self._maker.directory
        for name in directory.names(until=self._maker.now()):
            if self._newest is not None and name == self._newest[0]:
                return
            backup = directory.read(name)
            manifest = None if backup is None else backup.manifest
            if manifest is not None and manifest.hub_public_key == self._hub_public_key():
                self._note(name, manifest)
                return
        with self._lock:
            self._newest = None

    def _note(self, name: str, manifest: Manifest) -> None:
        with self._lock:
            self._newest = name, manifest

    def _hash(self, identity: FileIdentity | None) -> str:
        if identity is None or self._hashed[0] != identity:
            text, found, _ = self._reader.read()
            self._hashed = found, hashlib.sha256(text).hexdigest()
        return self._hashed[1]

    def _prune(self, made: Path) -> None:
        backups = self._maker.directory.backups()
        for backup in expired(backups, self._hub_public_key(), self._retention, self._maker.now()):
            if backup.path != made:
                backup.path.unlink(missing_ok=True)
                log.info("backup_deleted", extra={"path": backup.path})
