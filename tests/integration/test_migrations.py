"""The schema that the migrations make is the one that the tables in the code describe, on both databases."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from backend.adapters.records import audit, database
from backend.adapters.records.database import Database

# All tables: the module that was imported last has added its own.
METADATA = audit.audit.metadata
REVISIONS = [script.revision for script in ScriptDirectory(str(database._MIGRATIONS)).walk_revisions()]
DESCRIBED = "described"
# The first migration gave it a name to which the convention added its prefix once more. Databases that were
# made since have that name, and nothing asks for it.
MISNAMED = {"ck_hub_state_ck_hub_state_single": "ck_hub_state_single"}

Schema = dict[str, dict[str, Any]]


@pytest.fixture(params=["sqlite", "postgresql"])
def unmigrated(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    sqlite = f"sqlite:///{tmp_path}/state/records.sqlite"
    opened = Database(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres_database"))
    yield opened
    opened.close()


@pytest.fixture
def engine(unmigrated: Database) -> sa.Engine:
    unmigrated.migrate()
    return unmigrated.engine


def migrate_to(engine: sa.Engine, revision: str, go: Callable[[Config, str], None] = command.upgrade) -> None:
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        go(config, revision)


def reflect(engine: sa.Engine, schema: str | None = None) -> Schema:
    """Return everything that the database itself says about its tables, apart from the triggers."""
    inspector = sa.inspect(engine)
    tables: Schema = {}
    for name in inspector.get_table_names(schema):
        if name == "alembic_version":
            continue
        tables[name] = {
            "columns": [
                {
                    **column,
                    "type": repr(column["type"]),
                    # PostgreSQL's sequences are named with their schema.
                    "default": column["default"] and column["default"].replace(f"{schema}.", ""),
                }
                for column in inspector.get_columns(name, schema)
            ],
            "primary key": inspector.get_pk_constraint(name, schema),
            "unique": in_order(inspector.get_unique_constraints(name, schema)),
            "check": in_order(
                {**check, "name": MISNAMED.get(str(check["name"]), check["name"])}
                for check in inspector.get_check_constraints(name, schema)
            ),
            "foreign keys": in_order(
                {**key, "referred_schema": None} for key in inspector.get_foreign_keys(name, schema)
            ),
            "indexes": in_order(as_text(index) for index in inspector.get_indexes(name, schema)),
            "without rowid": is_without_rowid(engine, name),
        }
    return tables


def as_text(index: Any) -> dict[str, Any]:
    """Return an index whose condition can be compared."""
    options = {name: str(option) for name, option in index.get("dialect_options", {}).items()}
    return {**index, "dialect_options": options}


def in_order(constraints: Any) -> list[Any]:
    return sorted(constraints, key=lambda constraint: str(constraint["name"]))


def is_without_rowid(engine: sa.Engine, table: str) -> bool:
    if engine.dialect.name != "sqlite":
        return False
    with engine.connect() as connection:
        kinds = connection.exec_driver_sql(f"PRAGMA table_list('{table}')").mappings()
        return any(row["wr"] for row in kinds)


def triggers(engine: sa.Engine) -> list[str]:
    """Return the triggers' definitions, and the functions that they call."""
    statement = (
        "SELECT sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
        if engine.dialect.name == "sqlite"
        else "SELECT pg_get_triggerdef(t.oid) || ' ' || pg_get_functiondef(t.tgfoid) "
        "FROM pg_trigger t WHERE NOT t.tgisinternal ORDER BY t.tgname"
    )
    with engine.connect() as connection:
        return [" ".join(sql.split()) for sql in connection.exec_driver_sql(statement).scalars()]


def described(engine: sa.Engine, directory: Path) -> Schema:
    """Return the schema that the tables in the code make, without any migration."""
    if engine.dialect.name == "sqlite":
        fresh = sa.create_engine(f"sqlite:///{directory}/described.sqlite")
        METADATA.create_all(fresh)
        schema = reflect(fresh)
        fresh.dispose()
        return schema
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {DESCRIBED}")
        METADATA.create_all(connection.execution_options(schema_translate_map={None: DESCRIBED}))
    return reflect(engine, DESCRIBED)


def test_migrated_schema_equals_the_described_one(engine: sa.Engine, tmp_path: Path) -> None:
    migrated = reflect(engine)
    expected = described(engine, tmp_path)
    assert set(migrated) == set(expected) == set(METADATA.tables)
    for table in METADATA.tables:
        assert migrated[table] == expected[table], table


def test_reflection_sees_each_kind_of_difference(engine: sa.Engine) -> None:
    # The comparison above is worth as much as what it looks at.
    schema = reflect(engine)
    assert "VARCHAR(length=44)" in str(schema["peers"]["columns"])
    assert [unique["name"] for unique in schema["peers"]["unique"]] == [
        "uq_peers_hub",
        "uq_peers_node_id",
        "uq_peers_wireguard_public_key",
    ]
    assert [check["name"] for check in schema["credentials"]["check"]] == [
        "ck_credentials_kind",
        "ck_credentials_uses",
    ]
    assert "max_uses" in schema["credentials"]["check"][1]["sqltext"]
    assert [index["name"] for index in schema["answers"]["indexes"]] == [
        "ix_answers_created_at",
        "ix_answers_node_id",
    ]
    assert schema["answers"]["primary key"]["constrained_columns"] == ["scope", "key_hash"]
    assert schema["nonces"]["without rowid"] == (engine.dialect.name == "sqlite")


def test_alembic_finds_no_difference_in_types_or_defaults(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, METADATA) == []


def test_the_server_refuses_changes_of_the_audit_log(engine: sa.Engine) -> None:
    found = triggers(engine)
    if engine.dialect.name == "sqlite":
        unless = "WHEN OLD.sequence > (SELECT audit_pruned_sequence FROM access_state)"
        assert [sql.partition(" BEGIN ")[0] for sql in found] == [
            f"CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit {unless}",
            "CREATE TRIGGER audit_refuses_update BEFORE UPDATE ON audit",
        ]
        assert all("RAISE(ABORT, 'the audit log is append-only')" in sql for sql in found)
    else:
        changes, deletions = found
        for part in ("BEFORE UPDATE OR TRUNCATE", "FOR EACH STATEMENT", "RAISE EXCEPTION"):
            assert part in changes
        for part in (
            "BEFORE DELETE",
            "FOR EACH ROW",
            "OLD.sequence > (SELECT",
            "RAISE EXCEPTION",
        ):
            assert part in deletions


@pytest.mark.parametrize("revision", [*REVISIONS, "base"])
def test_a_downgrade_takes_back_what_the_upgrade_did(unmigrated: Database, revision: str) -> None:
    engine = unmigrated.engine
    if revision != "base":
        migrate_to(engine, revision)
    before = reflect(engine), triggers(engine)
    unmigrated.migrate()
    head = reflect(engine), triggers(engine)
    migrate_to(engine, revision, command.downgrade)
    assert (reflect(engine), triggers(engine)) == before
    unmigrated.migrate()
    assert (reflect(engine), triggers(engine)) == head


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("hubs", {"id": 1, "name": "", "generation": 0, "observed_generation": 0}),
        ("access_state", {"id": 1, "credentials_version": 0, "audit_sequence": 0, "audit_hash": "0" * 64}),
    ],
)
def test_a_new_database_begins_with_one_row_of_each_state(
    engine: sa.Engine, table: str, values: dict[str, object]
) -> None:
    rows = METADATA.tables[table]
    with engine.connect() as connection:
        (row,) = connection.execute(sa.select(rows)).mappings()
        assert {name: row[name] for name in values} == values
    for refused in (1,) if table == "hubs" else (1, 2):
        with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
            connection.execute(sa.insert(rows).values({**row, "id": refused}))
