"""Makes backups, and verifies each by restoring it into the scratch directory."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final

from backend import __version__
from backend.adapters.backups.archive import copy_with_room, make_file, member_of, require_room, unpack, write
from backend.adapters.backups.directory import BackupDirectory
from backend.adapters.records import copies
from backend.adapters.records.database import Database
from backend.errors import BackupError, ConfigFileError
from backend.models.backups import CONFIG, RECORDS, Manifest, Origin
from backend.models.trusted_paths import make_private_directory
from backend.models.wireguard.records import RecordedState
from backend.services.hub.backups import Backup
from backend.services.hub.config_reader import ConfigReader
from backend.services.hub.config_text import parse
from backend.services.hub.config_values import InvalidConfigError

# What `verify` leaves in the scratch directory.
REBUILT: Final = "rebuilt.sqlite"
# How often the records are there at most while a backup is made: the archive, and three times unpacked.
_COPIES: Final = 4


@dataclass(frozen=True, slots=True)
class Verified:
    """A backup that was verified, and what it holds. `config` is None if it has no wg0.conf."""

    manifest: Manifest
    state: RecordedState
    config: bytes | None
    # The records as a database of this version's schema, in the scratch directory.
    rebuilt: Path


def verify(archive: IO[bytes], scratch: Path) -> Verified:
    """Verify an archive by restoring it into `scratch`; raise BackupError or OSError."""
    manifest = unpack(archive, scratch)
    copy, rebuilt = scratch / RECORDS, scratch / REBUILT
    if RECORDS not in manifest.files:
        raise BackupError("this is no backup: it has no records")
    copies.examine(copy)
    copied = copies.rebuild(copy, rebuilt)
    found = (
        copied.state.generation,
        copied.state.observed_generation,
        len(copied.state.peers),
        copied.revision,
    )
    said = (manifest.generation, manifest.observed_generation, manifest.peers, manifest.schema_revision)
    if found != said:
        raise BackupError("the backup is damaged: its records aren't those that the manifest describes")
    copy.unlink()
    config = None
    if CONFIG in manifest.files:
        config = (scratch / CONFIG).read_bytes()
        if key_of(config, "the backup's wg0.conf") != manifest.hub_public_key:
            raise BackupError("the backup is damaged: its wg0.conf has another key than the manifest says")
    return Verified(manifest, copied.state, config, rebuilt)


def key_of(config: bytes, what: str) -> str:
    """Return the hub's public key of a config; raise BackupError where it can't be used."""
    try:
        return parse(config).hub_public_key
    except InvalidConfigError as exc:
        raise BackupError(f"{what} can't be used: {exc.problem}") from None


class BackupMaker:
    """Makes backups of one hub. Needs no lock of the service's: it reads as any other process may."""

    def __init__(
        self,
        directory: BackupDirectory,
        database: Database,
        config_path: Path,
        interface: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.directory: Final = directory
        self._database = database
        self.reader: Final = ConfigReader(config_path)
        self._interface = interface
        self.now: Final = now

    def make(self, origin: Origin) -> Backup:
        """Make a backup in the directory; raise BackupError or ProvisioningError."""
        self.directory.make()
        with explained(self.directory.path), self.directory.locked_scratch() as scratch:
            return self.make_in(scratch, origin)

    def make_in(self, scratch: Path, origin: Origin, *, config_needed: bool = True) -> Backup:
        """Make a backup in the directory. The caller holds the lock. Raises OSError, too."""
        manifest = self._collect(scratch, origin, config_needed=config_needed)
        temporary = self.directory.temporary
        try:
            self._write(temporary, manifest, scratch)
            path = self.directory.publish(manifest)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return Backup(path, path.stat().st_size, manifest, None)

    @contextmanager
    def making(self) -> Iterator[tuple[IO[bytes], Manifest]]:
        """Make a backup that is to be written elsewhere; yield it as an open file without a name.

        Raises as `make` does. The lock is released before the file is yielded, because a copy to elsewhere
        may be slow.
        """
        with ExitStack() as stack:
            with explained(self.directory.path), self.directory.locked_scratch() as scratch:
                manifest = self._collect(scratch, Origin.COMMAND)
                self._write(scratch / "archive", manifest, scratch)
                file = stack.enter_context((scratch / "archive").open("rb"))
            yield file, manifest

    def _collect(self, scratch: Path, origin: Origin, *, config_needed: bool = True) -> Manifest:
        """Write the archive's members into `scratch`, and return the manifest."""
        # Before anything is written: the service's records may be on the same disk, and need room to grow.
        require_room(scratch, copies.size_of(self._database) * _COPIES)
        made_at = self.now()
        # The config before the records, so that the records are never the older of the two: a start adds the
        # peers that the file lacks, but an operator has to decide about peers that the records lack.
        config = self._read_config(needed=config_needed)
        files = {}
        if config is not None:
            with make_file(scratch / CONFIG) as file:
                file.write(config)
            files[CONFIG] = member_of(scratch / CONFIG)
        copied = copies.save(self._database, scratch / RECORDS)
        files[RECORDS] = member_of(scratch / RECORDS)
        kind = "sqlite" if self._database.engine.dialect.name == "sqlite" else "postgresql"
        return Manifest(
            made_at=made_at,
            origin=origin,
            service_version=__version__,
            interface=self._interface,
            hub_public_key=None if config is None else key_of(config, str(self.reader.path)),
            generation=copied.state.generation,
            observed_generation=copied.state.observed_generation,
            database=kind,
            schema_revision=copied.revision,
            peers=len(copied.state.peers),
            files=files,
        )

    def _read_config(self, *, needed: bool) -> bytes | None:
        try:
            config, *_ = self.reader.read()
            key_of(config, str(self.reader.path))
        except (ConfigFileError, BackupError):
            if needed:
                raise
            return None
        return config

    def _write(self, path: Path, manifest: Manifest, scratch: Path) -> None:
        """Write the archive durably, delete what it was made from, and verify it."""
        with make_file(path) as file:
            write(file, manifest, scratch)
            file.flush()
            os.fsync(file.fileno())
        for name in manifest.files:
            (scratch / name).unlink()
        trial = scratch / "trial"
        trial.mkdir(mode=0o700)
        with path.open("rb") as file:
            verify(file, trial)
        shutil.rmtree(trial)


@contextmanager
def opened(archive: Path, scratch: Path) -> Iterator[IO[bytes]]:
    """Open an archive. `-` is the standard input, which is first copied to an unnamed file in `scratch`."""
    if archive == Path("-"):
        # None where the process was started without one.
        if sys.stdin is None:
            raise BackupError("there is no input to read a backup from; name its file")
        make_private_directory(scratch)
        with TemporaryFile(dir=scratch) as copy:
            copy_with_room(sys.stdin.buffer, copy, scratch)
            yield copy
        return
    if not archive.is_file():
        problem = "is no file" if archive.exists() else "doesn't exist; `backup list` prints the names"
        raise BackupError(f"{archive} {problem}")
    with archive.open("rb") as file:
        yield file


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn an OSError into a BackupError that names the file, or else `place`."""
    try:
        yield
    except OSError as exc:
        where, reason = exc.filename or place, exc.strerror or exc
        raise BackupError(f"{where} can't be read or written ({reason}); mend that, and try again") from exc
