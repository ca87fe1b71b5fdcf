"""Restores a backup: finds out what would change, saves the present state, and replaces it as a whole."""

import io
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from backend.adapters.backups.directory import BackupDirectory, stamp
from backend.adapters.backups.maker import BackupMaker, Verified, explained, key_of
from backend.adapters.records.copies import prepare, require_usable
from backend.adapters.records.replacement import PresentRecords, write_new
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import BackupError, ConfigFileError
from backend.models.backups import CONFIG, Origin
from backend.models.wireguard.records import RecordedState
from backend.services.hub.backups import PeerComparison, compare
from backend.services.hub.config_reader import ConfigReader
from backend.services.hub.mark import HubMark, Mark
from backend.services.hub.staged_file import stage_file, sync_directory


class ConfigAction(StrEnum):
    """What a restore does with wg0.conf, as it is printed after `config:`."""

    ABSENT = "the backup has none; what is at the path stays"
    SAME = "the backup's is the same"
    MADE = "there is none, so the backup's is put there"
    KEPT = "stays as it is, and differs from the backup's (--config replaces it)"
    REPLACED = "the backup's takes its place"


@dataclass(frozen=True, slots=True)
class RestoredHub:
    """The hub that a backup is restored to. `stated_key` is WIREGUARD_HUB_PUBLIC_KEY."""

    config_path: Path
    interface: str
    stated_key: str | None
    present: PresentRecords


class Restoration:
    """Compares a verified backup with the present state, and replaces that. No service may run meanwhile."""

    def __init__(
        self,
        verified: Verified,
        hub: RestoredHub,
        directory: BackupDirectory,
        scratch: Path,
        *,
        replace_config: bool,
    ) -> None:
        """Compare, and change nothing; raise BackupError if the backup is another hub's."""
        require_usable(verified.rebuilt)
        self.verified = verified
        self._hub = hub
        self._directory = directory
        self._scratch = scratch
        self._reader = ConfigReader(hub.config_path)
        self._config = self._read_config()
        self.problem = hub.present.problem
        self.present: RecordedState | None = None
        if hub.present.database is not None:
            self.present = SqlRecords(hub.present.database).load()
        self.config = self._config_action(replace_config=replace_config)
        self._require_same_hub(replace_config=replace_config)

    @property
    def peers(self) -> PeerComparison:
        """Return what happens to the records' peers."""
        return compare(() if self.present is None else self.present.peers, self.verified.state.peers)

    def carry_out(self) -> list[Path]:
        """Save the present state, and replace it; return the files that it was saved to.

        A kill leaves the old records or the new ones, and the restore can be repeated. Raises BackupError.
        """
        with explained(self._hub.config_path):
            saved = self._save()
            self._raise_mark()
            prepare(self.verified.rebuilt, self.verified.manifest.made_at)
            self._hub.present.replace(self.verified.rebuilt)
            # After the records: with the config alone, a start would take the file's peers into new records.
            self._replace_config()
        return saved

    def _read_config(self) -> bytes | None:
        try:
            return self._reader.read()[0]
        except ConfigFileError as exc:
            if self._reader.look()[1] is None and not os.path.lexists(self._hub.config_path):
                return None
            raise BackupError(str(exc)) from exc

    def _config_action(self, *, replace_config: bool) -> ConfigAction:
        restored = self.verified.config
        if restored is None:
            return ConfigAction.ABSENT
        if self._config is None:
            return ConfigAction.MADE
        if self._config == restored:
            return ConfigAction.SAME
        return ConfigAction.REPLACED if replace_config else ConfigAction.KEPT

    def _require_same_hub(self, *, replace_config: bool) -> None:
        theirs = self.verified.manifest.hub_public_key
        if theirs is None:
            return
        if self._hub.stated_key not in {None, theirs}:
            raise BackupError(
                f"the backup is of a hub with the key {theirs}, and WIREGUARD_HUB_PUBLIC_KEY names another "
                "one; take that hub's backup, or change the setting first"
            )
        ours = self._present_key()
        if ours not in {None, theirs} and not replace_config:
            raise BackupError(
                f"the backup is of a hub with the key {theirs}, and {self._reader.path} has another one; "
                "with --config the backup's config takes its place as well, and this host becomes that hub"
            )

    def _present_key(self) -> str | None:
        try:
            return None if self._config is None else key_of(self._config, str(self._reader.path))
        except BackupError:
            return None

    def _save(self) -> list[Path]:
        """Save the present state: as a backup, or as plain copies where no backup can be made."""
        directory, present = self._directory, self._hub.present
        directory.make()
        saved, config_saved = [], False
        if present.database is not None:
            place = self._scratch / "present"
            place.mkdir(mode=0o700)
            maker = BackupMaker(directory, present.database, self._hub.config_path, self._hub.interface)
            made = maker.make_in(place, Origin.REPLACED, config_needed=False)
            config_saved = made.manifest is not None and CONFIG in made.manifest.files
            saved.append(made.path)
        name = f"{Origin.REPLACED}-{stamp(datetime.now(UTC))}"
        if present.database is None:
            for end, part in present.files():
                with part.open("rb") as content:
                    write_new(content, directory.path / f"{name}.sqlite{end}")
                saved.append(directory.path / f"{name}.sqlite{end}")
        if self.config is ConfigAction.REPLACED and not config_saved and self._config is not None:
            write_new(io.BytesIO(self._config), directory.path / f"{name}.conf")
            saved.append(directory.path / f"{name}.conf")
        return saved

    def _raise_mark(self) -> None:
        """Have the next start notice that the records are older, even if the hub's mark was lost."""
        database = self._hub.present.database
        if database is None or self.present is None or not self._is_same_hub():
            return
        mark = HubMark(self._reader.path)
        if mark.read().generation < self.present.generation:
            mark.write(Mark(self.present.generation, *SqlRecords(database).status().audit_head))

    def _is_same_hub(self) -> bool:
        return self._present_key() == self.verified.manifest.hub_public_key

    def _replace_config(self) -> None:
        restored = self.verified.config
        if restored is None or self.config not in {ConfigAction.MADE, ConfigAction.REPLACED}:
            return
        path, identity = self._reader.look()
        if identity is None:
            write_new(io.BytesIO(restored), path)
            return
        staged = stage_file(path, restored, identity)
        if staged is None or not staged.replace():
            raise BackupError(f"another program writes to {path}; the records are restored, the config isn't")
        sync_directory(path.parent)
