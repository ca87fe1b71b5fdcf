"""The service's own backups: made after changes, once a day, and deleted when there are enough."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from backend.adapters.backups.automatic import AutomaticBackups
from backend.adapters.backups.directory import BackupDirectory
from backend.adapters.backups.maker import BackupMaker
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import BackupError
from backend.models.backups import Origin
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.backups import QUIET_SECONDS, Retention
from tests.harness.backups import NOON
from tests.harness.records import adding

DAY = 86400.0


@dataclass
class Hub:
    """A hub's records and file, and the clocks of what makes its backups."""

    directory: Path
    database: Database
    seconds: float = 0.0
    wall: datetime = NOON
    key: WireGuardPrivateKey = field(default_factory=WireGuardPrivateKey.generate)
    generation: int = 0

    def __post_init__(self) -> None:
        self.config = self.directory / "wg0.conf"
        self.config.write_text(f"[Interface]\nPrivateKey = {self.key.reveal()}\n")
        self.backups = BackupDirectory(self.directory / "backups", self.directory / "state")

    def start(self) -> AutomaticBackups:
        maker = BackupMaker(self.backups, self.database, self.config, "wg0", lambda: self.wall)
        return AutomaticBackups(
            maker,
            self.key.public_key,
            lambda: self.generation,
            Retention(3, 2),
            lambda: self.seconds,
        )

    def change(self) -> None:
        """Commit a change of a peer."""
        self.generation += 1
        number = self.generation + 1
        SqlRecords(self.database).commit(self.generation, 0, [adding(f"node-{number}", f"10.0.0.{number}")])

    def wait(self, seconds: float) -> None:
        self.seconds += seconds
        self.wall += timedelta(seconds=seconds)

    @property
    def made(self) -> list[int]:
        """The generations of the backups, the oldest first."""
        return [int(name.split("-g")[1].split(".")[0]) for name in reversed(self.backups.names())]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with closing(Database(f"sqlite:///{tmp_path}/state/provisioning.sqlite")) as database:
        database.migrate()
        yield Hub(tmp_path, database)


def test_entry_that_can_not_be_looked_at_keeps_none_from_being_made(hub: Hub) -> None:
    hub.backups.make()
    name = "auto-20260101T000000.000Z-g7.tar.gz"
    (hub.backups.path / name).symlink_to(name)
    automatic = hub.start()
    for _ in range(2):
        automatic.run()
        hub.wait(DAY)
    found = {backup.path.name: backup.problem for backup in hub.backups.backups()}
    assert len(found) == 3
    assert [problem for problem in found.values() if problem] == [found[name]]
    assert "Too many levels of symbolic links" in str(found[name])


def test_first_run_makes_one_and_the_next_waits_for_a_change_and_a_quiet_time(hub: Hub) -> None:
    automatic = hub.start()
    assert automatic.last_backup_at() is None
    automatic.run()
    assert automatic.last_backup_at() == NOON.timestamp()
    hub.wait(QUIET_SECONDS)
    automatic.run()
    assert hub.made == [0]
    hub.change()
    automatic.run()
    hub.wait(QUIET_SECONDS - 1)
    automatic.run()
    # Another one: it isn't quiet yet.
    hub.change()
    automatic.run()
    hub.wait(QUIET_SECONDS - 1)
    automatic.run()
    assert hub.made == [0]
    hub.wait(1)
    automatic.run()
    assert hub.made == [0, 2]
    hub.config.write_text(hub.config.read_text() + "# by hand\n")
    automatic.run()
    hub.wait(QUIET_SECONDS)
    automatic.run()
    assert hub.made == [0, 2, 2]
    assert automatic.last_backup_at() == hub.wall.timestamp()


def test_day_is_counted_by_the_backup_and_not_by_the_process(hub: Hub) -> None:
    hub.start().run()
    hub.wait(DAY - 1)
    hub.start().run()
    assert hub.made == [0]
    hub.wait(1)
    restarted = hub.start()
    assert restarted.last_backup_at() == NOON.timestamp()
    restarted.run()
    assert hub.made == [0, 0]


def test_backup_of_a_command_counts(hub: Hub) -> None:
    automatic = hub.start()
    BackupMaker(hub.backups, hub.database, hub.config, "wg0", lambda: hub.wall).make(Origin.COMMAND)
    automatic.run()
    assert len(hub.made) == 1
    assert automatic.last_backup_at() == NOON.timestamp()


def test_clock_that_was_wrong_stops_no_backup(hub: Hub) -> None:
    hub.wall += timedelta(days=1000)
    hub.start().run()
    hub.wall = NOON
    automatic = hub.start()
    assert automatic.last_backup_at() is None
    for _ in range(3):
        automatic.run()
    assert automatic.last_backup_at() == NOON.timestamp()
    assert len(hub.made) == 2


def test_old_ones_are_deleted_and_what_is_not_ours_stays(hub: Hub) -> None:
    automatic = hub.start()
    maker = BackupMaker(hub.backups, hub.database, hub.config, "wg0", lambda: hub.wall)
    kept = maker.make(Origin.COMMAND).path
    torn = hub.backups.path / "auto-20200101T000000.000Z-g1.tar.gz"
    torn.write_bytes(b"torn")
    for _ in range(7):
        hub.wait(DAY)
        automatic.run()
    assert kept.exists()
    assert torn.exists()
    assert len(hub.made) == 2 + 3


def test_failure_keeps_the_last_good_one_and_the_next_run_tries_again(hub: Hub) -> None:
    automatic = hub.start()
    automatic.run()
    text = hub.config.read_text()
    hub.wait(DAY)
    hub.config.write_text("[Interface]\n")
    for _ in range(2):
        with pytest.raises(BackupError) as caught:
            automatic.run()
        # The loop logs a cause once: by its text.
        assert str(caught.value).endswith("can't be used: no [Interface] section has a PrivateKey")
    assert automatic.last_backup_at() == NOON.timestamp()
    hub.config.write_text(text)
    automatic.run()
    assert automatic.last_backup_at() == hub.wall.timestamp()


def test_deleted_directory_is_noticed(hub: Hub) -> None:
    automatic = hub.start()
    automatic.run()
    for path in hub.backups.path.iterdir():
        path.unlink()
    hub.backups.path.rmdir()
    automatic.run()
    assert len(hub.made) == 1
