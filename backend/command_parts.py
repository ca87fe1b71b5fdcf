"""Opens the parts that a command works with, beside the running service or without it."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from backend.adapters.backups.directory import BackupDirectory
from backend.adapters.backups.maker import BackupMaker, explained, opened, verify
from backend.adapters.backups.restorer import Restoration, RestoredHub
from backend.adapters.host.locks import ConfigGuard, lock_interface
from backend.adapters.host.private_files import ADMIN_HEADER
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import open_beside
from backend.adapters.records.replacement import PresentRecords, require_file
from backend.adapters.records.unit_of_work import SqlRecords
from backend.composition import make_hub, make_pool
from backend.errors import StartRefusedError
from backend.models.operator_commands import command
from backend.models.setting_values import ReloadMode
from backend.models.trusted_paths import make_private_directory, require_trusted, require_trusted_file
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.hub.mark import HubMark
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.reconciler import Reconciler
from backend.services.hub.review import HubReview
from backend.services.wireguard_config_manager import WireGuardConfigManager
from backend.settings import Settings


@dataclass(frozen=True, slots=True)
class HubDecisions:
    """The records and the hub, for a command that shows an operator what differs and keeps a decision."""

    records: SqlRecords
    reconciler: Reconciler
    mark: HubMark

    def review(self) -> HubReview:
        """Compare the records with the hub, and change nothing."""
        return HubReview.make(self.records, self.reconciler, self.mark.read())


@contextmanager
def open_hub_decisions(settings: Settings) -> Iterator[HubDecisions]:
    """Open the records beside the hub for a command, whether the service runs or not."""
    if not settings.enable_dbos:
        raise StartRefusedError(
            "with ENABLE_DBOS=false the records live in the service's memory: restart it, and it takes the "
            "peers of the config into them; peers that only the interface has go with "
            f"{command('hub down')} and {command('hub up')}"
        )
    require_trusted_file(settings.wireguard_config_path, "WIREGUARD_CONFIG_PATH")
    config = WireGuardConfigManager(settings.wireguard_config_path)
    with (
        closing(open_beside(settings.database_url, settings.state_directory)) as database,
        closing(make_hub(settings)) as hub,
        closing(InterfaceObserver(hub)) as observer,
        closing(Reconciler(config, hub, OperatorPeers(make_pool(settings)), observer)) as reconciler,
    ):
        yield HubDecisions(SqlRecords(database), reconciler, HubMark(config.path))


@contextmanager
def open_access(settings: Settings) -> Iterator[SqlAccessStore]:
    """Open credentials and audit log for a command, whether the service runs or not."""
    if not settings.enable_dbos:
        raise StartRefusedError(
            "with ENABLE_DBOS=false credentials live in the service's memory; make them over HTTP, by POST "
            f"/api/v1/wireguard/keys or /tokens with curl -H @{settings.state_directory / ADMIN_HEADER}"
        )
    with closing(open_beside(settings.database_url, settings.state_directory)) as database:
        yield SqlAccessStore(database)


@contextmanager
def open_backups(settings: Settings) -> Iterator[BackupMaker]:
    """Open the maker of backups for a command, whether the service runs or not."""
    directory = backup_directory(settings)
    require_trusted_file(settings.wireguard_config_path, "WIREGUARD_CONFIG_PATH")
    with explained(settings.state_directory):
        require_file(settings.database_url)
    with closing(open_beside(settings.database_url, settings.state_directory)) as database:
        yield BackupMaker(directory, database, settings.wireguard_config_path, settings.interface)


@contextmanager
def open_restoration(settings: Settings, archive: Path, *, replace_config: bool) -> Iterator[Restoration]:
    """Lock the records and the config, so that no service runs until the end, and verify an archive."""
    directory, path = backup_directory(settings), settings.wireguard_config_path
    require_trusted_file(path, "WIREGUARD_CONFIG_PATH")
    with ExitStack() as stack:
        # Before any lock, which the program at the other end of a pipe may need.
        file = stack.enter_context(opened(directory.find(archive), directory.state))
        make_private_directory(path.parent)
        stack.enter_context(ConfigGuard(path))
        if settings.wireguard_reload is not ReloadMode.OFF:
            stack.enter_context(lock_interface(settings.interface))
        present = stack.enter_context(
            closing(PresentRecords(settings.database_url, settings.state_directory))
        )
        scratch = stack.enter_context(directory.locked_scratch())
        place = scratch / "restored"
        place.mkdir(mode=0o700)
        yield Restoration(
            verify(file, place),
            RestoredHub(path, settings.interface, settings.wireguard_hub_public_key, present),
            directory,
            scratch,
            replace_config=replace_config,
        )


def backup_directory(settings: Settings) -> BackupDirectory:
    """Return the directory of the backups; raise StartRefusedError where there can be none."""
    if not settings.enable_dbos:
        raise StartRefusedError(
            "with ENABLE_DBOS=false the records live in the service's memory and can't be backed up or "
            "restored; copy the hub's config instead"
        )
    require_trusted(settings.backup_directory, "WIREGUARD_BACKUP_DIRECTORY")
    return BackupDirectory(settings.backup_directory, settings.state_directory)
