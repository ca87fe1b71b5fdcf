"""Databases of earlier versions that are migrated, and migrated back."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from backend.adapters.records import audit, database, tables
from backend.adapters.records.database import Database
from backend.errors import StartRefusedError
from backend.models.access.audit import (
    GENESIS,
)
from tests.harness.access_records import append, event, make_token


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
        with engine.connect() as connection:
            (peer,) = tables.load_state(connection).peers
            assert peer.node_id == "node-1"
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
    with engine.connect() as connection:
        assert len(tables.load_state(connection).peers) == 1
