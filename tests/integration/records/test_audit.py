"""The recorded audit log, on both databases."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.adapters.records import audit
from backend.adapters.records.database import Database
from backend.models.access.audit import (
    GENESIS,
    AuditAction,
    AuditOutcome,
    AuditQuery,
    verify,
)
from tests.harness.access_records import NOON, append, event, together


def verified(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        audit.hold_still(connection)
        head, start = audit.audit_head(connection), audit.audit_start(connection)
        return verify(audit.iterate_audit(connection), head, start)


def test_the_audit_log_is_read_as_it_was_written(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        audit.append_audit(connection, [])
        assert audit.audit_head(connection) == (0, GENESIS)
    events = [
        event("node-1", at=NOON.replace(microsecond=123), source="::1", request_id="r-1"),
        event("ünï\u2028", outcome=AuditOutcome.REFUSED, reason='"; DROP TABLE audit', count=100),
        event(action=AuditAction.HUB_FAILED, outcome=AuditOutcome.NOTED, actor="service"),
    ]
    assert append(engine, *events[:2]) == 2
    assert append(engine, events[2]) == 3
    with engine.connect() as connection:
        rows = list(audit.iterate_audit(connection))
        audit.append_audit(connection, [])
        assert audit.audit_head(connection) == (3, rows[-1].hash)
    assert [row.sequence for row in rows] == [1, 2, 3]
    assert [row.event for row in rows] == [given.storable() for given in events]
    assert [row.previous_hash for row in rows] == [GENESIS, rows[0].hash, rows[1].hash]
    assert verified(engine) is None


def test_event_with_unstorable_text_is_logged(engine: sa.Engine) -> None:
    append(engine, event("\x00\ud800", actor="x" * 100_000, reason="\x1b[2J", request_id="\udfff" * 9999))
    assert verified(engine) is None


def test_the_log_is_listed_from_its_end_in_pages(engine: sa.Engine) -> None:
    append(engine, *(event(f"node-{number % 3}", actor=f"key:{number % 2}") for number in range(10)))
    append(engine, event("node-1", action=AuditAction.DEPROVISION))

    def listed(before: int | None = None, limit: int = 100, **chosen: Any) -> list[int]:
        with engine.connect() as connection:
            found = audit.list_audit(connection, AuditQuery(limit=limit, before=before, **chosen))
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


def test_rolled_back_act_leaves_no_row_and_no_gap(engine: sa.Engine) -> None:
    append(engine, event())
    with engine.connect() as connection:
        audit.append_audit(connection, [event(), event()])
        connection.rollback()
    assert append(engine, event()) == 2
    assert verified(engine) is None


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"])
def test_log_rows_cannot_be_changed_or_deleted(engine: sa.Engine, statement: str) -> None:
    append(engine, event(), event())
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(statement)
    if engine.dialect.name == "postgresql":
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE audit")
    assert verified(engine) is None


def tamper(engine: sa.Engine, *statements: str) -> None:
    """Change the log as a superuser of the database could."""
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
def test_tampering_is_located(engine: sa.Engine, statements: list[str], says: str) -> None:
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
def test_value_of_a_foreign_sqlite_type_is_located(tmp_path: Path, statement: str) -> None:
    opened = Database(f"sqlite:///{tmp_path}/records.sqlite")
    opened.migrate()
    append(opened.engine, event(), event(), event())
    tamper(opened.engine, statement)
    assert "Row 2 was changed" in (verified(opened.engine) or "nothing")
    opened.close()
