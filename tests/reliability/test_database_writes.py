"""Databases that can be read and, for a while, not written."""

import itertools
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from backend.adapters.records.database import Database
from backend.adapters.records.tables import hubs
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import RecordsUnavailableError
from tests.harness.patience import eventually
from tests.harness.records import adding
from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface

# Writes what is there already.
TOUCH = sa.update(hubs).values(generation=hubs.c.generation)


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Prevent the file from being opened for writing, by root too; open descriptors still work."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{path}")
    database.migrate()
    yield database
    database.close()


def test_read_only_connections_are_not_kept(needs_namespaces: None, database: Database, path: Path) -> None:
    engine = database.engine
    with read_only(path), engine.connect() as first, engine.connect() as second:
        # The pool had one, and opened the other now.
        refused = 0
        for connection in (first, second):
            try:
                connection.execute(TOUCH)
                connection.commit()
            except sa.exc.OperationalError:
                refused += 1
        assert refused == 1
    # A moment later it is opened anew, whether anything has failed or not.
    opened_at = time.monotonic()
    eventually(lambda: time.monotonic() - opened_at > 0.5)
    for _ in range(10):
        with engine.begin() as connection, engine.connect():
            connection.execute(TOUCH)


def test_unwritable_database_turns_readiness_red_before_any_change(
    needs_namespaces: None, database: Database, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    records = SqlRecords(database)
    records.check_writable()
    database.note_not_written(ValueError("some time has passed"))
    caplog.clear()
    database.engine.dispose()
    with read_only(path):
        for _ in range(2):
            with pytest.raises(
                RecordsUnavailableError, match="can't be written: attempt to write a readonly"
            ):
                records.check_writable()
    records.check_writable()
    records.commit(1, 0, [adding("node-1", "10.0.0.2")])
    records.check_writable()
    # Once each, however often it was met.
    assert [record.message for record in caplog.records] == ["database_writable"]


def test_locked_database_does_not_hold_up_health_checks(
    database: Database, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.adapters.records.database._TRIAL_TIMEOUT_MS", 50)
    records = SqlRecords(database)
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RecordsUnavailableError, match="database is locked"):
            records.check_writable()
        other.execute("COMMIT")
        records.check_writable()
        with database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 30_000
    finally:
        other.close()


def test_read_only_server_is_found_by_the_check_for_writes(postgres_database: str) -> None:
    database = Database(postgres_database)
    records = SqlRecords(database)
    try:
        database.migrate()
        records.check_writable()
        name = sa.make_url(postgres_database).database
        with database.engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        database.engine.dispose()
        database.note_not_written(ValueError("some time has passed"))
        with pytest.raises(RecordsUnavailableError, match="in a read-only transaction"):
            records.check_writable()
    finally:
        database.close()


def test_provisions_work_again_once_the_database_is_writable(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(
        settings_for(hub_interface, tmp_path, WIREGUARD_AUTH="off", WIREGUARD_IP_POOL="10.0.0.0/16")
    )

    def add(number: int) -> int:
        # With a key, so that the records are read as well, by several connections.
        key = {"Idempotency-Key": f"key-{number}"}
        return service.client.post(PROVISION, json=provision_body(f"node-{number}"), headers=key).status_code

    with ThreadPoolExecutor(16) as threads:
        with read_only(tmp_path / "state" / "provisioning.sqlite"):
            met = set(threads.map(add, range(64)))
        assert met <= {200, 503}
        writable_at, numbers = time.monotonic(), itertools.count(100)
        eventually(lambda: add(next(numbers)) == 200 and time.monotonic() - writable_at > 0.5)
        assert set(threads.map(add, itertools.islice(numbers, 40))) == {200}
    assert set(map(add, itertools.islice(numbers, 20))) == {200}
    assert len(assert_in_step(service, hub_interface)) > 60
    assert "Traceback" not in service.log
    assert " dbos " not in service.log
