"""Databases of earlier versions that are migrated, and migrated back."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from backend.adapters.records import audit, database, tables
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import AddressTakenError, StartRefusedError
from backend.models.access.audit import GENESIS
from backend.models.access.idempotency import Answer
from backend.models.wireguard.peer import PeerState
from backend.models.wireguard.records import Decision
from tests.harness.access_records import append, event, make_token
from tests.harness.peers import NOON
from tests.harness.records import adding, removing, states


def migrate_to(engine: sa.Engine, revision: str, go: Callable[[Config, str], None] = command.upgrade) -> None:
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        go(config, revision)


def insert_peer(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            """INSERT INTO peers (node_id, wireguard_public_key, assigned_ip, public_key, provisioned_at,
            version, capabilities, generation)
            VALUES ('node-1', 'vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8=', '10.0.0.2', 'libp2p',
            '2026-02-19 12:00:00', '1.0.0', '{}', 1)"""
        )


def named_columns(engine: sa.Engine, table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(engine).get_columns(table)}


def test_a_database_with_peers_goes_on_and_back(unmigrated: Database) -> None:
    engine = unmigrated.engine
    migrate_to(engine, "0001")
    insert_peer(engine)
    assert "token_id" not in named_columns(engine, "peers")
    for _ in range(2):
        unmigrated.migrate()
        (peer,) = SqlRecords(unmigrated).load().peers
        assert peer.node_id == "node-1"
        with engine.connect() as connection:
            assert connection.scalar(sa.select(tables.peers.c.token_id)) is None
            assert audit.audit_head(connection) == (0, GENESIS)
        make_token(engine)
        append(engine, event())
        migrate_to(engine, "0001", command.downgrade)
        assert set(sa.inspect(engine).get_table_names()) == {"peers", "hub_state", "alembic_version"}
        assert "token_id" not in named_columns(engine, "peers")


def test_a_migration_that_fails_leaves_the_schema_as_it_was(unmigrated: Database) -> None:
    engine = unmigrated.engine
    migrate_to(engine, "0001")
    insert_peer(engine)
    with engine.begin() as connection:
        # In the way of the last table.
        connection.exec_driver_sql("CREATE TABLE nonces (id INTEGER)")
    with pytest.raises(StartRefusedError, match="can't be updated"):
        unmigrated.migrate()
    assert "token_id" not in named_columns(engine, "peers")
    assert not sa.inspect(engine).has_table("credentials")
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE nonces")
    unmigrated.migrate()
    assert len(SqlRecords(unmigrated).load().peers) == 1


def fill_0004(engine: sa.Engine) -> None:
    """Write what a hub of revision 0004 has: two peers, a third that was removed, and a decision."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            """INSERT INTO peers (node_id, wireguard_public_key, assigned_ip, public_key,
            provisioned_at, version, capabilities, metadata, generation, token_id) VALUES
            ('node-2', 'vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8=', '10.0.0.3', 'libp2p-2',
            '2026-02-19 12:00:00', '1.0.0', '{"cpu_cores": 8}', '{"region": "eu-1"}', 5, '0123456789abcdef'),
            ('node-1', 'xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=', '10.0.0.2', '',
            '2026-02-19 12:00:00', '', '{}', NULL, 6, NULL)"""
        )
        connection.exec_driver_sql(
            "INSERT INTO removed_peers (wireguard_public_key, node_id, generation, removed_at) "
            "VALUES ('gone', 'node-3', 4, '2026-02-19 12:00:00')"
        )
        connection.exec_driver_sql(
            "INSERT INTO notices (id, at, text) VALUES (1, '2026-02-19 12:00:00', 'look')"
        )
        connection.exec_driver_sql(
            "UPDATE hub_state SET generation = 6, applied_generation = 5, decision = 'adopt', "
            "decision_basis = 'these'"
        )


def test_a_database_of_one_hub_is_migrated_with_all_that_it_has(unmigrated: Database) -> None:
    migrate_to(unmigrated.engine, "0004")
    fill_0004(unmigrated.engine)
    unmigrated.migrate()
    records = SqlRecords(unmigrated)
    state = records.load()
    second, first = state.peers
    assert (state.generation, state.observed_generation) == (6, 5)
    assert (first.node_id, str(first.address), first.public_key, first.token_id) == (
        "node-1",
        "10.0.0.2",
        "",
        None,
    )
    assert (second.node_id, str(second.address), second.token_id) == (
        "node-2",
        "10.0.0.3",
        "0123456789abcdef",
    )
    with unmigrated.engine.connect() as connection:
        rows = sa.select(tables.peers).order_by(tables.peers.c.sequence)
        written, adopted = connection.execute(rows).all()
    assert (written.public_key, written.version) == ("libp2p-2", "1.0.0")
    assert (written.capabilities, written.metadata) == ({"cpu_cores": 8}, {"region": "eu-1"})
    assert (adopted.version, adopted.capabilities, adopted.metadata) == ("", {}, None)
    assert (second.provisioned_at, first.provisioned_at) == (NOON, NOON)
    assert states(unmigrated) == {"node-2": PeerState.ACTIVE, "node-1": PeerState.ACTIVE}
    assert records.removed_keys(["gone", "another"]) == {"gone"}
    status = records.status()
    assert (status.decision, status.basis, status.notices) == (Decision.ADOPT, "these", ("look",))
    with unmigrated.engine.connect() as connection:
        assert connection.execute(sa.select(tables.hubs.c.id, tables.hubs.c.name)).all() == [(1, "")]

    # It goes on behind the last, under the interface's name.
    records.name_hub("wg0")
    new = adding("node-4", "10.0.0.4")
    taken = adding("node-5", "10.0.0.2")
    records.commit(7, 6, [new, taken, removing(second)])
    assert isinstance(taken.refusal, AddressTakenError)
    assert list(records.load().peers) == [first, new.peer]


def test_a_downgrade_keeps_the_peers_of_the_first_hub_that_are_not_being_removed(
    unmigrated: Database,
) -> None:
    engine = unmigrated.engine
    unmigrated.migrate()
    with engine.begin() as connection:
        hub = {"id": 2, "name": "wg1", "generation": 0, "observed_generation": 0}
        connection.execute(sa.insert(tables.hubs).values(hub))
    kept, removed = adding("kept", "10.0.0.2"), adding("removed", "10.0.0.3")
    for change in (kept, removed):
        node_id = change.peer.node_id
        change.answer = Answer("service", f"key of {node_id}", "body", node_id, b"{}", NOON)
    records = SqlRecords(unmigrated)
    records.commit(1, 0, [kept, removed])
    records.commit(2, 1, [removing(removed.peer)])
    SqlRecords(unmigrated, 2).commit(1, 0, [adding("of-hub-2", "10.0.0.2")])
    migrate_to(engine, "0004", command.downgrade)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT node_id FROM peers").scalars().all() == ["kept"]
        states_of_hubs = connection.exec_driver_sql(
            "SELECT id, generation, applied_generation, decision FROM hub_state"
        )
        assert states_of_hubs.all() == [(1, 2, 1, None)]
        # Known as removed where the hub still has it, and its answer is given no more.
        tombstones = connection.exec_driver_sql("SELECT wireguard_public_key, generation FROM removed_peers")
        assert tombstones.all() == [(removed.peer.wireguard_public_key, 2)]
        assert connection.exec_driver_sql("SELECT node_id FROM answers").scalars().all() == ["kept"]
    unmigrated.migrate()
    assert list(SqlRecords(unmigrated).load().peers) == [kept.peer]
