"""The SQL of credentials, audit, answers and nonces, on both databases."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from backend.adapters.records import audit, credentials, database, idempotency, tables
from backend.adapters.records.database import Database
from backend.errors import StartRefusedError
from backend.models.access.answers import Answer
from backend.models.access.audit import (
    GENESIS,
    AuditAction,
    AuditEvent,
    AuditOutcome,
    AuditQuery,
    verify,
)
from backend.models.access.credentials import Credential, KeyRequest, Role, TokenRequest

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
LATER = NOON + timedelta(hours=2)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/records.sqlite"
    address: str = request.getfixturevalue("postgres_database")
    return address


@pytest.fixture
def unmigrated(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def engine(unmigrated: Database) -> sa.Engine:
    unmigrated.migrate()
    return unmigrated.engine


def make_token(engine: sa.Engine, **asked: Any) -> str:
    token, _ = TokenRequest.model_validate(asked).make("cli:root", NOON)
    with engine.begin() as connection:
        credentials.insert_credential(connection, token)
    return token.id


def make_key(engine: sa.Engine, role: Role = Role.READ) -> str:
    key, _ = KeyRequest(role=role).make("cli:root", NOON)
    with engine.begin() as connection:
        credentials.insert_credential(connection, key)
    return key.id


def count(engine: sa.Engine, wanted: dict[str, int], now: datetime = NOON) -> dict[str, int]:
    with engine.begin() as connection:
        return credentials.count_uses(connection, wanted, now)


def stored(engine: sa.Engine) -> dict[str, Credential]:
    with engine.connect() as connection:
        return {found.id: found for found in credentials.load_credentials(connection)}


def uses(engine: sa.Engine) -> dict[str, int]:
    return {name: credential.uses for name, credential in stored(engine).items()}


def event(subject: str | None = None, **over: Any) -> AuditEvent:
    base = AuditEvent(NOON, AuditAction.PROVISION, AuditOutcome.ACCEPTED, "local", subject)
    return replace(base, **over)


def append(engine: sa.Engine, *events: AuditEvent) -> int:
    with engine.begin() as connection:
        return audit.append_audit(connection, events)


def verified(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        audit.hold_still(connection)
        head, start = audit.audit_head(connection), audit.audit_start(connection)
        return verify(audit.iterate_audit(connection), head, start)


def together(number: int, work: Callable[[int], None]) -> None:
    """Run `work` in so many threads at once, and raise what any of them raised."""
    barrier, failures = threading.Barrier(number), list[BaseException]()

    def run(index: int) -> None:
        try:
            barrier.wait(30)
            work(index)
        except BaseException as exc:  # noqa: BLE001 - raised below
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]


def test_a_credential_comes_back_as_it_was(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert credentials.load_credentials(connection) == []
        assert credentials.credentials_version(connection) == 0
    asked = {"max_uses": 3, "node_id_pattern": "n-*", "source_cidr": "2001:db8::/32"}
    token, _ = TokenRequest.model_validate({**asked, "note": "ünï"}).make("cli:root", NOON)
    key, _ = KeyRequest(role=Role.ADMIN).make("cli:root", NOON + timedelta(microseconds=1))
    with engine.begin() as connection:
        credentials.insert_credential(connection, key)
        credentials.insert_credential(connection, token)
    with engine.connect() as connection:
        assert credentials.load_credentials(connection) == [token, key]
        assert credentials.credentials_version(connection) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "guest"},
        {"kind": "key", "role": "owner", "max_uses": None},
        {"kind": "key", "role": None, "max_uses": None},
        {"kind": "key", "role": "read"},
        {"role": "admin"},
        {"max_uses": None},
        {"uses": 2},
        {"uses": -1},
    ],
)
def test_the_constraints_refuse_what_is_no_credential(engine: sa.Engine, values: dict[str, Any]) -> None:
    name = make_token(engine)
    table = credentials.credentials
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id == name).values(**values))


def test_a_revoked_credential_is_kept_and_stays_as_it_was_revoked_first(engine: sa.Engine) -> None:
    name = make_key(engine)
    for at in (NOON, LATER):
        with engine.begin() as connection:
            revoked = credentials.revoke_credential(connection, name, at)
        assert revoked == stored(engine)[name]
        assert revoked is not None
        assert revoked.revoked_at == NOON
    with engine.begin() as connection:
        assert credentials.revoke_credential(connection, "0" * 16, NOON) is None
        # Made once, revoked once: what changes nothing lets nobody read it all again.
        assert credentials.credentials_version(connection) == 2


def test_the_last_use_never_goes_back(engine: sa.Engine) -> None:
    first, second = make_key(engine), make_key(engine)
    for used in ({first: LATER}, {first: NOON, second: NOON, "0" * 16: NOON}, {}):
        with engine.begin() as connection:
            credentials.note_used(connection, used)
    assert {name: found.last_used_at for name, found in stored(engine).items()} == {
        first: LATER,
        second: NOON,
    }


def test_a_token_has_no_more_uses_than_it_was_made_with(engine: sa.Engine) -> None:
    name = make_token(engine, max_uses=3)
    assert [count(engine, {name: 1})[name] for _ in range(5)] == [1, 1, 1, 0, 0]
    assert stored(engine)[name].last_used_at == NOON


def test_what_is_left_is_granted_where_more_is_wanted(engine: sa.Engine) -> None:
    first, second, third = (make_token(engine, max_uses=number) for number in (5, 64, 2))
    key = make_key(engine)
    wanted = {first: 64, second: 64, third: 1, key: 1, "0" * 16: 2}
    assert count(engine, wanted) == {first: 5, second: 64, third: 1, key: 0, "0" * 16: 0}
    assert count(engine, wanted) == {first: 0, second: 0, third: 1, key: 0, "0" * 16: 0}
    assert uses(engine) == {first: 5, second: 64, third: 2, key: 0}
    assert count(engine, {}) == {}
    assert count(engine, {first: 0}) == {first: 0}


def test_many_tokens_of_one_use_are_counted_each(engine: sa.Engine) -> None:
    names = [make_token(engine) for _ in range(20)]
    count(engine, dict.fromkeys(names[::2], 1))
    granted = count(engine, dict.fromkeys(names, 1))
    assert granted == {name: index % 2 for index, name in enumerate(names)}
    assert set(uses(engine).values()) == {1}


@pytest.mark.parametrize("wanted", [1, 2])
def test_a_token_that_is_over_is_not_counted(engine: sa.Engine, wanted: int) -> None:
    expired, revoked = (make_token(engine, max_uses=9, expires_in=60) for _ in range(2))
    with engine.begin() as connection:
        credentials.revoke_credential(connection, revoked, NOON)
    now = NOON + timedelta(seconds=60)
    assert count(engine, {expired: wanted, revoked: wanted}, now) == {expired: 0, revoked: 0}
    before = now - timedelta(microseconds=1)
    assert count(engine, {expired: wanted, revoked: wanted}, before) == {expired: wanted, revoked: 0}


def test_a_use_that_was_not_made_of_it_is_given_back_and_no_more(engine: sa.Engine) -> None:
    first, second = make_token(engine, max_uses=5), make_token(engine, max_uses=5)
    count(engine, {first: 3, second: 3})
    with engine.begin() as connection:
        credentials.return_uses(connection, {first: 2, second: 9, "0" * 16: 1})
        credentials.return_uses(connection, {first: 0})
    assert uses(engine) == {first: 1, second: 0}


def test_uses_of_a_transaction_that_was_rolled_back_were_never_made(engine: sa.Engine) -> None:
    name = make_token(engine, max_uses=5)
    with engine.connect() as connection:
        assert credentials.count_uses(connection, {name: 9}, NOON) == {name: 5}
        connection.rollback()
    assert uses(engine) == {name: 0}


@pytest.mark.parametrize(("most", "each"), [(1, 1), (10, 3)])
def test_of_those_who_race_for_the_last_use_one_gets_it(engine: sa.Engine, most: int, each: int) -> None:
    for _ in range(5):
        name = make_token(engine, max_uses=most)
        granted: list[int] = []
        together(8, lambda _: granted.append(count(engine, {name: each})[name]))  # noqa: B023 - ends before
        assert sum(granted) == most
        assert uses(engine)[name] == most


def test_those_who_count_many_tokens_at_once_do_not_wait_for_each_other_forever(engine: sa.Engine) -> None:
    names = [make_token(engine, max_uses=60) for _ in range(10)]
    granted: list[int] = []

    def work(index: int) -> None:
        mine = names if index % 2 else names[::-1]
        for _ in range(10):
            wanted = {name: 1 + (index + place) % 3 for place, name in enumerate(mine)}
            granted.append(sum(count(engine, wanted).values()))

    together(6, work)
    assert sum(granted) == 600
    assert set(uses(engine).values()) == {60}


def test_the_audit_log_is_read_as_it_was_written(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert audit.audit_head(connection) == (0, GENESIS)
        assert audit.append_audit(connection, []) == 0
    events = [
        event("node-1", at=NOON.replace(microsecond=123), source="::1", request_id="r-1"),
        event("ünï\u2028", outcome=AuditOutcome.REFUSED, reason='"; DROP TABLE audit', count=100),
        event(action=AuditAction.HUB_FAILED, outcome=AuditOutcome.NOTED, actor="service"),
    ]
    assert append(engine, *events[:2]) == 2
    assert append(engine, events[2]) == 3
    with engine.connect() as connection:
        rows = list(audit.iterate_audit(connection))
        assert audit.audit_head(connection) == (3, rows[-1].hash)
        assert audit.append_audit(connection, []) == 3
    assert [row.sequence for row in rows] == [1, 2, 3]
    assert [row.event for row in rows] == [given.storable() for given in events]
    assert [row.previous_hash for row in rows] == [GENESIS, rows[0].hash, rows[1].hash]
    assert verified(engine) is None


def test_nobody_keeps_their_refusal_out_of_the_log(engine: sa.Engine) -> None:
    append(engine, event("\x00\ud800", actor="x" * 100_000, reason="\x1b[2J", request_id="\udfff" * 9999))
    assert verified(engine) is None


def test_the_log_is_listed_from_its_end_in_pages(engine: sa.Engine) -> None:
    append(engine, *(event(f"node-{number % 3}", actor=f"key:{number % 2}") for number in range(10)))
    append(engine, event("node-1", action=AuditAction.DEPROVISION))

    def listed(before: int | None = None, limit: int = 100, **chosen: Any) -> list[int]:
        with engine.connect() as connection:
            found = audit.list_audit(connection, AuditQuery(limit, before, **chosen))
        return [row.sequence for row in found]

    assert listed(limit=3) == [11, 10, 9]
    assert listed(9, 3) == [8, 7, 6]
    assert listed(1) == []
    assert listed(subject="node-1") == [11, 8, 5, 2]
    assert listed(subject="node-1", actor="key:1") == [8, 2]
    assert listed(9, action=AuditAction.PROVISION, limit=1) == [8]


def test_writers_at_the_same_time_make_one_chain(engine: sa.Engine) -> None:
    def work(index: int) -> None:
        for _ in range(10):
            append(engine, *[event(f"{index}")] * 3)

    together(6, work)
    assert verified(engine) is None
    with engine.connect() as connection:
        rows = list(audit.iterate_audit(connection))
    assert len(rows) == 180
    # What one transaction wrote stands together.
    assert all(len({row.event.subject for row in rows[at : at + 3]}) == 1 for at in range(0, 180, 3))


def test_a_log_that_grows_meanwhile_is_verified_as_it_was(engine: sa.Engine) -> None:
    append(engine, event(), event())
    with engine.connect() as connection:
        audit.hold_still(connection)
        head = audit.audit_head(connection)
        append(engine, event())
        assert verify(audit.iterate_audit(connection), head) is None
    assert verified(engine) is None


def test_an_act_that_did_not_happen_leaves_no_row_and_no_gap(engine: sa.Engine) -> None:
    append(engine, event())
    with engine.connect() as connection:
        audit.append_audit(connection, [event(), event()])
        connection.rollback()
    assert append(engine, event()) == 2
    assert verified(engine) is None


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"])
def test_the_log_takes_nothing_back(engine: sa.Engine, statement: str) -> None:
    append(engine, event(), event())
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(statement)
    if engine.dialect.name == "postgresql":
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE audit")
    assert verified(engine) is None


def tamper(engine: sa.Engine, *statements: str) -> None:
    """Change the log as somebody does who may do anything with the database."""
    triggers = (
        ["DROP TRIGGER audit_refuses_update", "DROP TRIGGER audit_refuses_delete"]
        if engine.dialect.name == "sqlite"
        else ["ALTER TABLE audit DISABLE TRIGGER ALL"]
    )
    with engine.begin() as connection:
        for statement in (*triggers, *statements):
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        (["UPDATE audit SET actor = 'nobody' WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET subject = NULL WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET source = '' WHERE sequence = 3"], "Row 3 was changed"),
        (
            ["UPDATE audit SET at = '2026-02-19T12:00:00+00:00' WHERE sequence = 3"],
            "Row 3 was changed",
        ),
        (["UPDATE audit SET at = 'yesterday' WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET action = 'nap', outcome = 'bliss' WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET count = 2 WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET hash = previous_hash WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET previous_hash = hash WHERE sequence = 3"], "Row 3 was changed"),
        (["UPDATE audit SET sequence = 9 WHERE sequence = 3"], "Row 3 is missing"),
        (["UPDATE audit SET sequence = 0 WHERE sequence = 3"], "Row 0 stands where row 1"),
        (["DELETE FROM audit WHERE sequence = 3"], "Row 3 is missing"),
        (["DELETE FROM audit WHERE sequence = 1"], "Row 1 is missing"),
        (["DELETE FROM audit WHERE sequence >= 4"], "Row 4 is missing"),
        (["DELETE FROM audit"], "Row 1 is missing"),
        (
            [
                "UPDATE audit SET sequence = -2 WHERE sequence = 2",
                "UPDATE audit SET sequence = 2 WHERE sequence = 4",
                "UPDATE audit SET sequence = 4 WHERE sequence = -2",
            ],
            "Row 2 was changed",
        ),
        (
            [
                """INSERT INTO audit (sequence, at, action, outcome, actor, count, previous_hash, hash)
                SELECT 6, at, action, outcome, actor, count, previous_hash, hash FROM audit
                WHERE sequence = 5"""
            ],
            "Row 6 was changed",
        ),
        (["UPDATE access_state SET audit_sequence = 4"], "Row 5 was inserted"),
        (["UPDATE access_state SET audit_sequence = 6"], "Row 6 is missing"),
        (["UPDATE access_state SET audit_hash = 'nothing'"], "Row 5 was replaced"),
    ],
)
def test_what_is_done_to_the_log_by_hand_is_named(
    engine: sa.Engine, statements: list[str], says: str
) -> None:
    append(engine, *(event(f"node-{number}") for number in range(1, 6)))
    tamper(engine, *statements)
    assert says in (verified(engine) or "nothing")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET count = 1.5 WHERE sequence = 2",
        "UPDATE audit SET count = 'many' WHERE sequence = 2",
        "UPDATE audit SET actor = x'6c6f6f706261636b' WHERE sequence = 2",
        "UPDATE audit SET at = x'00' WHERE sequence = 2",
        "UPDATE audit SET hash = x'00' WHERE sequence = 2",
    ],
)
def test_a_type_that_sqlite_takes_and_nobody_wrote_is_named(tmp_path: Path, statement: str) -> None:
    opened = Database(f"sqlite:///{tmp_path}/records.sqlite")
    opened.migrate()
    append(opened.engine, event(), event(), event())
    tamper(opened.engine, statement)
    assert "Row 2 was changed" in (verified(opened.engine) or "nothing")
    opened.close()


def answer(key_hash: str, node_id: str = "node-1", at: datetime = NOON, body: bytes = b"{}") -> Answer:
    return Answer("token:0123456789abcdef", key_hash, "b" * 64, node_id, body, at)


def find(engine: sa.Engine, key_hash: str) -> Answer | None:
    with engine.connect() as connection:
        return idempotency.find_answer(connection, "token:0123456789abcdef", key_hash)


def test_an_answer_is_found_by_its_callers_key_byte_for_byte(engine: sa.Engine) -> None:
    first, second = answer("1", body=bytes(range(256))), answer("2", at=LATER)
    with engine.begin() as connection:
        idempotency.save_answers(connection, [first, second])
        idempotency.save_answers(connection, [])
        idempotency.save_answers(connection, [answer("1", body=b"another")])
        assert idempotency.find_answer(connection, "local", "1") is None
    assert (find(engine, "1"), find(engine, "2"), find(engine, "3")) == (first, second, None)


def test_answers_are_forgotten_with_their_node_and_with_time(engine: sa.Engine) -> None:
    gone, old, kept = answer("1", "node-1", LATER), answer("2", "node-2"), answer("3", "node-3", LATER)
    with engine.begin() as connection:
        idempotency.save_answers(connection, [gone, old, kept])
        idempotency.forget_answers_of(connection, ["node-1", "node-9"])
        idempotency.forget_answers_of(connection, [])
        assert idempotency.forget_answers_before(connection, LATER) == 1
    assert (find(engine, "1"), find(engine, "2"), find(engine, "3")) == (None, None, kept)


def test_a_nonce_is_accepted_once_for_each_identity(engine: sa.Engine) -> None:
    def burn(*given: tuple[str, str]) -> set[tuple[str, str]]:
        with engine.begin() as connection:
            return idempotency.burn_nonces(connection, [(*pair, LATER) for pair in given])

    assert burn() == set()
    assert burn(("a", "1"), ("a", "2"), ("b", "1"), ("a", "1")) == {("a", "1"), ("a", "2"), ("b", "1")}
    assert burn(("a", "1"), ("b", "2")) == {("b", "2")}
    with engine.begin() as connection:
        assert idempotency.forget_nonces_before(connection, LATER) == 0
        assert idempotency.forget_nonces_before(connection, LATER + timedelta(microseconds=1)) == 4
    assert burn(("a", "1")) == {("a", "1")}


def test_a_nonce_that_many_bring_at_once_is_accepted_from_one(engine: sa.Engine) -> None:
    accepted: list[tuple[str, str]] = []

    def burn(index: int) -> None:
        for identity in map(str, range(10)):
            given = [(identity, str(number), LATER) for number in range(200)]
            with engine.begin() as connection:
                accepted.extend(idempotency.burn_nonces(connection, given[:: 1 if index % 2 else -1]))

    together(6, burn)
    assert len(accepted) == len(set(accepted)) == 2000


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
