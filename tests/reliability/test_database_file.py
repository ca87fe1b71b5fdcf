"""A SQLite file that is moved, deleted or replaced under a service that runs."""

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import InUseError, RecordsUnavailableError, StartRefusedError
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import TokenRequest
from tests.harness.patience import eventually
from tests.harness.records import adding
from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.wireguard import HubInterface


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "records.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{path}")
    database.migrate()
    yield database
    database.close()


def move(path: Path) -> None:
    path.rename(path.with_name("moved.sqlite"))


def move_back(path: Path) -> None:
    path.with_name("moved.sqlite").rename(path)


def rename_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("state.old"))


def rename_directory_back(path: Path) -> None:
    path.parent.with_name("state.old").rename(path.parent)


def swap(path: Path) -> None:
    move(path)
    shutil.copyfile(path.with_name("moved.sqlite"), path)


@pytest.mark.parametrize(
    ("hazard", "remedy", "said"),
    [
        (move, move_back, "was moved under the running service, to .*/state/moved.sqlite; move it back"),
        (rename_directory, rename_directory_back, "to .*/state.old/records.sqlite; move it back"),
        (
            swap,
            move_back,
            "another file than the database .* which is .*/moved.sqlite now; move that one back",
        ),
    ],
)
def test_moved_database_is_reported_until_it_is_back(
    database: Database,
    path: Path,
    hazard: Callable[[Path], None],
    remedy: Callable[[Path], None],
    said: str,
) -> None:
    hazard(path)
    for check in (database.check_file, database.check, SqlRecords(database).check):
        with pytest.raises(RecordsUnavailableError, match=said):
            check()
    remedy(path)
    database.check()


def test_deleted_database_is_reported_and_not_created_again(database: Database, path: Path) -> None:
    database.engine.dispose()
    path.unlink()
    with pytest.raises(RecordsUnavailableError, match=r"was deleted .* first, as root: `cp -p /proc/"):
        database.check()
    with pytest.raises(sa.exc.OperationalError, match="was deleted"), database.engine.connect():
        pass
    assert not path.exists()
    path.touch()
    with pytest.raises(RecordsUnavailableError, match=r"another file .*, which was deleted; restart"):
        database.check()


def test_database_link_that_is_redirected_is_reported(tmp_path: Path) -> None:
    link = tmp_path / "link.sqlite"
    link.symlink_to(tmp_path / "first.sqlite")
    database = Database(f"sqlite:///{link}")
    try:
        database.migrate()
        database.check()
        (tmp_path / "second.sqlite").touch(0o600)
        link.unlink()
        link.symlink_to(tmp_path / "second.sqlite")
        with pytest.raises(RecordsUnavailableError, match=r"another file .* which is .*/first.sqlite now"):
            database.check()
    finally:
        database.close()


def test_second_service_is_refused_through_a_link_to_the_database(
    database: Database, path: Path, tmp_path: Path
) -> None:
    database.check()
    link = tmp_path / "other" / "records.sqlite"
    link.parent.mkdir(0o700)
    link.symlink_to(path)
    with pytest.raises(InUseError, match=f"The database {link} is already managed by another process"):
        Database(f"sqlite:///{link}")
    # And the other way round.
    database.close()
    first = Database(f"sqlite:///{link}")
    with pytest.raises(InUseError, match="already managed"):
        Database(f"sqlite:///{path}")
    first.close()
    assert [file.name for file in link.parent.iterdir()] == ["records.sqlite"]


def test_start_waits_for_a_command_that_is_creating_the_database(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir(0o700)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        other.commit()

    monkeypatch.setattr("backend.adapters.records.sqlite.time.sleep", wait)
    second = Database(f"sqlite:///{path}", exclusive=False)
    assert not second.is_current()
    assert len(waits) == 1
    second.close()
    other.close()


def test_a_database_with_two_names_is_refused(path: Path, tmp_path: Path) -> None:
    """Each name would have its own lock file and its own write-ahead log."""
    Database(f"sqlite:///{path}").close()
    name = tmp_path / "state" / "other.sqlite"
    name.hardlink_to(path)
    for each in (path, name):
        with pytest.raises(StartRefusedError, match=f"has another name too, .* -samefile {each}`"):
            Database(f"sqlite:///{each}")
    name.unlink()
    Database(f"sqlite:///{path}").close()


def test_a_commit_to_a_database_that_is_deleted_meanwhile_does_not_succeed(
    database: Database, path: Path
) -> None:
    """Its batch would reach the hub, and the next start know nothing of it."""
    sa.event.listen(database.engine, "commit", lambda _: path.unlink(missing_ok=True))
    with pytest.raises(RecordsUnavailableError, match="was deleted"):
        SqlRecords(database).commit(1, 0, [adding("node-1", "10.0.0.2")])


def test_credential_is_not_acknowledged_while_the_database_is_moved_away(
    database: Database, path: Path
) -> None:
    store = SqlAccessStore(database)
    token, _ = TokenRequest().make("cli:root", datetime.now(UTC))
    event = SERVICE.event(datetime.now(UTC), AuditAction.TOKEN_MADE, AuditOutcome.ACCEPTED, token.id)
    sa.event.listen(database.engine, "commit", lambda _: move(path), once=True)
    with pytest.raises(RecordsUnavailableError, match="was moved"):
        store.keep_credential(token, event)
    with pytest.raises(RecordsUnavailableError, match="was moved"):
        store.keep_credential(token, event)
    move_back(path)
    # What is read goes on, and is the truth.
    assert [known.id for known in store.load_credentials()[1]] == [token.id]


def provision(service: ServiceProcess, *numbers: int) -> set[int]:
    return {
        service.client.post(PROVISION, json=provision_body(f"node-{number}")).status_code
        for number in numbers
    }


def lines(service: ServiceProcess, event: str) -> list[str]:
    return [line for line in service.log.splitlines() if f" {event} " in line]


def test_renamed_state_directory_is_reported_until_it_is_back(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    assert provision(service, 1, 2) == {200}
    before = (hub_interface.config_path.read_bytes(), hub_interface.peers())
    (tmp_path / "state").rename(tmp_path / "state.old")
    # Without a request that asks for it.
    eventually(lambda: len(lines(service, "database_away")) == 1)
    assert provision(service, 3, 4) == {503}
    red = service.client.get("/readyz")
    assert red.status_code == 503
    assert f"moved under the running service, to {tmp_path}/state.old/" in red.json()["detail"]
    assert (hub_interface.config_path.read_bytes(), hub_interface.peers()) == before
    assert set(listed(service)) == {"node-1", "node-2"}
    assert not (tmp_path / "state").exists()
    (tmp_path / "state.old").rename(tmp_path / "state")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert provision(service, 3) == {200}
    service.restart()
    assert set(assert_in_step(service, hub_interface)) == {"node-1", "node-2", "node-3"}
    assert (len(lines(service, "database_away")), len(lines(service, "database_back"))) == (1, 1)
    assert " ERROR " in lines(service, "database_away")[0]


@pytest.mark.parametrize("everything", [False, True])
def test_command_named_by_readyz_recovers_a_deleted_database(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, everything: bool
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    assert provision(service, *range(5)) == {200}
    before = assert_in_step(service, hub_interface)
    if everything:
        shutil.rmtree(tmp_path / "state")
    else:
        for file in (tmp_path / "state").glob("provisioning.sqlite*"):
            file.unlink()
    assert provision(service, 5) == {503}
    detail = service.client.get("/readyz").json()["detail"]
    found = re.search("`(.*)`", detail)
    assert found is not None, detail
    subprocess.run(found[1], shell=True, check=True)  # noqa: S602 - as the operator would
    assert service.client.get("/readyz").status_code == 503
    assert provision(service, 5) == {503}
    service.restart()
    assert assert_in_step(service, hub_interface) == before
    assert provision(service, 5) == {200}


def test_deleted_write_ahead_log_is_reported_and_a_restart_loses_nothing(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    assert provision(service, 1, 2) == {200}
    (tmp_path / "state" / "provisioning.sqlite-wal").unlink()
    assert provision(service, 3) == {503}
    assert "write-ahead log" in service.client.get("/readyz").json()["detail"]
    service.restart()
    assert set(assert_in_step(service, hub_interface)) == {"node-1", "node-2"}
    assert provision(service, 3) == {200}


def test_backup_moved_over_the_open_database_is_not_used(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    path = tmp_path / "state" / "provisioning.sqlite"
    assert provision(service, 1) == {200}
    shutil.copyfile(path, tmp_path / "backup.sqlite")
    (tmp_path / "backup.sqlite").rename(path)
    assert provision(service, 2) == {503}
    red = service.client.get("/readyz")
    assert red.status_code == 503
    assert "another file than the database" in red.json()["detail"]
    assert "restart the service to use the one that is there" in red.json()["detail"]
    assert set(assert_in_step(service, hub_interface)) == {"node-1"}


def test_backup_copied_into_the_open_database_is_refused_as_damaged_at_the_next_start(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    path = tmp_path / "state" / "provisioning.sqlite"
    assert provision(service, *range(5)) == {200}
    service.terminate()
    whole = path.read_bytes()
    # The same inode, and pages of two databases in it.
    torn = bytearray(whole)
    size = int.from_bytes(whole[16:18], "big")
    for page in range(2, len(whole) // size, 2):
        torn[page * size : (page + 1) * size] = bytes(size)
    path.write_bytes(torn)
    before = (hub_interface.config_path.read_bytes(), hub_interface.peers())
    service.ready = None
    service.start()
    assert service.wait_exit() != 0
    assert "is damaged" in service.log
    assert "put a backup in its place" in service.log
    assert "Traceback" not in service.log
    assert (hub_interface.config_path.read_bytes(), hub_interface.peers()) == before
    path.write_bytes(whole)
    service.ready = "/readyz"
    service.start()
    assert len(assert_in_step(service, hub_interface)) == 5
