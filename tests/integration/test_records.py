"""The records' SQL and its journal, on both databases."""

import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from dbos._dbos import _get_dbos_instance
from dbos._sys_db import db_retry
from hypothesis import given
from hypothesis import strategies as st

from backend.adapters import dbos_journal
from backend.adapters.dbos_journal import DbosJournal
from backend.adapters.records import tables
from backend.adapters.records.database import Database
from backend.errors import (
    AddressTakenError,
    DuplicatePeerError,
    OvertakenError,
    PeerNotFoundError,
    RecordsUnavailableError,
    StartRefusedError,
)
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.models.wireguard.provisioning import NodeCapabilities, ProvisioningRecord
from backend.services.ports import Action, Batch, Change
from tests.harness.requests import new_key
from tests.harness.torture import tried

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
KEYS = [new_key() for _ in range(6)]


def adding(node_id: str, address: str, key: str | None = None) -> Change:
    peer = Peer(node_id, "libp2p", WireGuardKey.parse(key or new_key()), IPv4Address(address), NOON)
    record = ProvisioningRecord(
        node_id=node_id,
        public_key=peer.public_key,
        wireguard_public_key=peer.wireguard_public_key,
        assigned_ip=peer.address,
        provisioned_at=NOON,
        capabilities=NodeCapabilities(models=["llama-2-7b"]),
        version="1.0.0",
        metadata={"nul": "\x00", "deep": [{"a": None}]},
    )
    return Change(Action.ADD, peer, lambda _: None, record)


def removing(node_id: str) -> Change:
    nobody = Peer(node_id, "", WireGuardKey.trusted(KEYS[0]), IPv4Address("10.0.0.2"), NOON)
    return Change(Action.REMOVE, nobody, lambda _: None)


def state(database: Database) -> tuple[list[Peer], int, int]:
    with database.engine.connect() as connection:
        loaded = tables.load_state(connection)
    return list(loaded.peers), loaded.generation, loaded.applied_generation


def rows(database: Database) -> list[sa.Row[tuple[object, ...]]]:
    with database.engine.connect() as connection:
        return list(connection.execute(sa.select(tables.peers).order_by(tables.peers.c.sequence)))


def intend(database: Database, generation: int, *changes: Change) -> list[tables.Row]:
    with database.engine.begin() as connection:
        return tables.write_intent(connection, Batch(generation, 0, list(changes)))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/records.sqlite"
    address: str = request.getfixturevalue("postgres_database")
    return address


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.close()


def test_what_was_written_is_read_in_the_order_it_came(database: Database) -> None:
    # An order that no other column has.
    names = ["node-3", "node-1", "node-5", "node-2", "node-4"]
    changes = [adding(name, f"10.0.0.{2 + number * 7 % 5}") for number, name in enumerate(names)]
    intend(database, 1, *changes)
    assert state(database) == ([change.peer for change in changes], 1, 0)
    assert rows(database)[0].metadata == {"nul": "\x00", "deep": [{"a": None}]}
    assert rows(database)[0].provisioned_at == NOON


def test_a_peer_whose_removal_was_taken_back_is_read_in_its_old_place(database: Database) -> None:
    # PostgreSQL puts its row behind the others, and the file's order would be another one after a restart.
    intend(database, 1, *(adding(f"node-{number}", f"10.0.0.{number + 2}") for number in range(3)))
    before = state(database)[0]
    removal = removing("node-0")
    removed = intend(database, 2, removal)
    with database.engine.begin() as connection:
        assert tables.revoke_intent(connection, 2, [removal], removed)
    assert state(database)[0] == before


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move host and server to where the clock shows nine hours more."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        patch.setenv("PGTZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def test_a_time_is_read_as_it_was_written_wherever_host_and_server_are(far_away: None, url: str) -> None:
    database = Database(url)
    database.migrate()
    west = NOON.astimezone(timezone(timedelta(hours=-5)))
    change = adding("node-1", "10.0.0.2")
    change.record = change.record and change.record.model_copy(update={"provisioned_at": west})
    intend(database, 1, change)
    (peer,), _, _ = state(database)
    assert (peer.provisioned_at, peer.provisioned_at.utcoffset()) == (NOON, timedelta(0))
    database.close()


def test_migrating_again_changes_nothing(database: Database) -> None:
    intend(database, 1, adding("node-1", "10.0.0.2"))
    before = rows(database)
    database.migrate()
    assert rows(database) == before


def test_what_is_committed_survives_a_power_cut(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/records.sqlite")
    with database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    database.close()


def test_an_old_sqlite_answers_what_dbos_asks_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 40, 1))
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    engine = Database(f"sqlite:///{tmp_path}/records.sqlite")
    with engine.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE t (at INTEGER NOT NULL DEFAULT (unixepoch('subsec') * 1000))"
        )
        connection.exec_driver_sql("INSERT INTO t DEFAULT VALUES")
        at = connection.exec_driver_sql("SELECT at FROM t").scalar_one()
    assert abs(at / 1000 - time.time()) < 60
    engine.close()


def test_a_database_of_a_newer_version_is_refused_in_a_sentence(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StartRefusedError, match="newer version"):
        database.migrate()


def test_a_database_whose_server_forgot_us_is_taken_again_or_given_up(postgres_database: str) -> None:
    first = Database(postgres_database)

    def restart() -> None:
        """Cut the connection that holds the lock, as a restart of the server does."""
        with first.engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks "
                "WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database "
                "WHERE datname = current_database())"
            )

    restart()
    first.check()
    with pytest.raises(StartRefusedError, match="another hub's service"):
        Database(postgres_database)
    restart()
    second = Database(postgres_database)
    with pytest.raises(OvertakenError):
        first.check()
    second.close()
    first.close()


def test_no_password_is_shown_wherever_the_url_has_it(tmp_path: Path) -> None:
    for url in (
        "postgresql+psycopg://u:sesame@127.0.0.1:1/d",
        "postgresql+psycopg://127.0.0.1:1/d?user=u&password=sesame",
    ):
        with pytest.raises(StartRefusedError, match="does not answer") as refused:
            Database(url)
        assert "sesame" not in str(refused.value)


def test_a_change_that_a_constraint_refuses_fails_alone(database: Database) -> None:
    first = adding("node-1", "10.0.0.2")
    intend(database, 1, first)
    same_address = adding("node-2", "10.0.0.2")
    same_name = adding("node-1", "10.0.0.3")
    same_key = adding("node-3", "10.0.0.4", first.peer.wireguard_public_key)
    unknown, fine = removing("nobody"), adding("node-4", "10.0.0.5")
    intend(database, 2, same_address, same_name, same_key, unknown, fine)
    assert isinstance(same_address.refusal, AddressTakenError)
    assert isinstance(same_name.refusal, DuplicatePeerError)
    assert isinstance(same_key.refusal, DuplicatePeerError)
    assert isinstance(unknown.refusal, PeerNotFoundError)
    assert fine.refusal is None
    assert state(database)[0] == [first.peer, fine.peer]


def test_a_revoked_intent_leaves_the_rows_as_they_were(database: Database) -> None:
    intend(database, 1, *(adding(f"node-{number}", f"10.0.0.{number + 2}") for number in range(3)))
    before = rows(database)
    changes = [removing("node-1"), adding("node-9", "10.0.0.9")]
    removed = intend(database, 2, *changes)
    with database.engine.begin() as connection:
        tables.revoke_intent(connection, 2, changes, removed)
    assert rows(database) == before


def test_an_intent_that_the_hub_has_reached_is_never_taken_back(database: Database) -> None:
    changes = [adding("node-1", "10.0.0.2")]
    intend(database, 1, *changes)
    with database.engine.begin() as connection:
        tables.mark_applied(connection, 1)
    with database.engine.begin() as connection:
        tables.revoke_intent(connection, 1, changes, [])
    assert [peer.node_id for peer in state(database)[0]] == ["node-1"]


def test_a_writer_that_has_been_overtaken_writes_nothing(database: Database) -> None:
    intend(database, 1, adding("node-1", "10.0.0.2"))
    with pytest.raises(OvertakenError, match="Another process"):
        intend(database, 1, adding("node-2", "10.0.0.3"))
    assert len(rows(database)) == 1


def test_a_generation_never_goes_back(database: Database) -> None:
    for generation in (3, 2):
        with database.engine.begin() as connection:
            tables.mark_applied(connection, generation)
    assert state(database)[2] == 3


@tried(30)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=6
        ),
        max_size=6,
    ),
    revoked=st.sets(st.integers(1, 6)),
)
def test_whatever_is_written_the_records_are_what_a_dict_would_be(
    tmp_path: Path, batches: list[list[tuple[bool, int, int, int]]], revoked: set[int]
) -> None:
    path = tmp_path / f"{uuid.uuid4().hex}.sqlite"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    model: dict[str, Peer] = {}
    for generation, batch in enumerate(batches, start=1):
        before = dict(model)
        changes, named = list[Change](), set[int]()
        for add, name, address, key in batch:
            if name not in named:  # the service never has two changes of one node under way
                named.add(name)
                node_id = f"node-{name}"
                changes.append(
                    adding(node_id, f"10.0.0.{address + 2}", KEYS[key]) if add else removing(node_id)
                )
        removed = intend(database, generation, *changes)
        for change in changes:
            if change.action is Action.REMOVE:
                assert (change.refusal is None) == (model.pop(change.peer.node_id, None) is not None)
        for change in changes:
            if change.action is Action.ADD:
                peer = change.peer
                held = {
                    value for p in model.values() for value in (p.node_id, p.address, p.wireguard_public_key)
                }
                fits = not held & {peer.node_id, peer.address, peer.wireguard_public_key}
                assert (change.refusal is None) == fits
                if fits:
                    model[peer.node_id] = peer
        if generation in revoked:
            with database.engine.begin() as connection:
                accepted = [change for change in changes if change.refusal is None]
                tables.revoke_intent(connection, generation, accepted, removed)
            model = before
        found = {peer.node_id: peer for peer in state(database)[0]}
        assert found == model
    database.close()


def test_a_burst_of_batches_is_one_workflow_that_ends_and_is_forgotten(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(url)
    database.migrate()
    journal = DbosJournal(database, "wg0")
    applied: list[int] = []

    def apply(batch: Batch | None) -> str | None:
        assert batch is not None
        applied.append(batch.generation)
        if batch.generation == 2:
            batch.failure = "no"
        return batch.failure

    try:
        journal.launch(apply)
        batches = [
            Batch(number, number - 1, [adding(f"node-{number}", f"10.0.0.{number + 1}")])
            for number in (1, 2, 3)
        ]
        for burst in (batches[:2], batches[2:]):
            journal.run(iter([*burst, None]).__next__)
        assert applied == [1, 2, 3]
        peers, generation, reached = state(database)
        assert [peer.node_id for peer in peers] == ["node-1", "node-3"]
        # How far the hub has come is noted with the next intent.
        assert (generation, reached) == (3, 2)

        def workflows() -> list[tuple[str, str, str]]:
            statement = "SELECT status, executor_id, application_version FROM workflow_status"
            if database.engine.dialect.name == "postgresql":
                statement = statement.replace("workflow_status", "dbos.workflow_status")
            with database.engine.connect() as connection:
                rows = connection.exec_driver_sql(statement).all()
            return [(row[0], row[1], row[2]) for row in rows]

        # Whoever comes next recovers what has the same two names.
        assert workflows() == [("SUCCESS", "wg0", "2")] * 2
        journal.tidy()
        assert len(workflows()) == 2
        monkeypatch.setattr(dbos_journal, "_TIDY_INTERVAL_SECONDS", 0.0)
        journal.tidy()
        assert len(workflows()) == 2
        monkeypatch.setattr(dbos_journal, "_KEEP_FINISHED", timedelta(seconds=-60))
        journal.tidy()
        assert workflows() == []
    finally:
        journal.close()


def test_dbos_hands_the_loss_of_its_database_on_instead_of_waiting(url: str) -> None:
    """A release of DBOS that names this otherwise would keep the one writing thread for a minute or more."""
    database = Database(url)
    journal = DbosJournal(database, "wg0")
    attempts: list[int] = []

    @db_retry(initial_backoff=30.0, sys_db=None)
    def ask(_: object) -> None:
        attempts.append(1)
        raise sa.exc.OperationalError(
            None, None, psycopg.OperationalError("gone"), connection_invalidated=True
        )

    try:
        database.migrate()
        journal.launch(lambda _: None)
        system_database = _get_dbos_instance()._sys_db
        assert system_database._retry_connection_errors is False
        with pytest.raises(sa.exc.OperationalError):
            ask(system_database)
        assert attempts == [1]
    finally:
        journal.close()


def test_a_database_that_went_away_is_named_and_nothing_else(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/records.sqlite")
    journal = DbosJournal(database, "wg0")
    try:
        with pytest.raises(RecordsUnavailableError, match="can't be read"):
            journal.load()
        with pytest.raises(RecordsUnavailableError, match="can't be written"):
            journal.mark_applied(1)
    finally:
        journal.close()


def test_a_database_that_can_not_be_used_refuses_the_start_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartRefusedError, match="STATE_DIRECTORY"):
        Database(f"sqlite:///{tmp_path}/file/records.sqlite")
    with pytest.raises(StartRefusedError, match="names no file"):
        Database("sqlite://")
    (tmp_path / "text.sqlite").write_text("this is no database, and long enough to be taken for one" * 100)
    database = Database(f"sqlite:///{tmp_path}/text.sqlite")
    with pytest.raises(StartRefusedError, match="not a database"):
        database.migrate()
    database.close()
