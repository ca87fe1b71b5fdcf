"""The audit log is pruned, and tampering with the rest is still detected."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa

from backend.adapters.records import audit
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.models.access.audit import (
    PRUNED,
    AuditAction,
    AuditEvent,
    AuditOutcome,
    AuditQuery,
    AuditRecord,
    chain_hash,
    verify,
)
from backend.models.access.callers import SERVICE
from backend.services.access import audit_writer
from backend.services.access.audit_writer import AuditWriter
from backend.services.hub.mark import HubMark, Mark
from tests.harness.command_line import hub_settings, invoke
from tests.harness.patience import eventually
from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

NOON: Final = datetime(2026, 2, 19, 12, tzinfo=UTC)
DAY: Final = timedelta(days=1)
PRUNE: Final = SERVICE.event(NOON + 30 * DAY, AuditAction.AUDIT_PRUNED, AuditOutcome.NOTED)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    sqlite = f"sqlite:///{tmp_path}/state/records.sqlite"
    database = Database(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres_database"))
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> SqlAccessStore:
    """Return a store with a log of ten days, a row each."""
    store = SqlAccessStore(database)
    store.write([event(number) for number in range(1, 11)], {})
    return store


def event(number: int) -> AuditEvent:
    return AuditEvent(
        NOON + number * DAY, AuditAction.PROVISION, AuditOutcome.ACCEPTED, "local", f"node-{number}"
    )


def rows(store: SqlAccessStore) -> list[AuditRecord]:
    return list(reversed(store.audit_page(AuditQuery(limit=1000))))


def test_a_pruned_log_is_whole_and_says_what_it_has_lost(store: SqlAccessStore) -> None:
    old = rows(store)
    # In small steps, and none where there is nothing old enough.
    counts = [store.prune_audit(NOON + 6 * DAY, 3, PRUNE) for _ in range(3)]
    assert counts == [3, 2, 0]
    left = rows(store)
    assert left[:5] == old[5:]
    assert [(row.event.subject, row.event.reason, row.event.count) for row in left[5:]] == [
        ("3", old[2].hash, 3),
        ("5", old[4].hash, 2),
    ]
    wrong, head, start = store.verify_audit()
    assert (wrong, head, start) == (None, (12, left[-1].hash), (5, old[4].hash))
    store.write([event(11)], {})
    assert store.verify_audit()[0] is None
    # All of it, the earlier checkpoints among it.
    assert store.prune_audit(NOON + 60 * DAY, 1000, PRUNE) == 8
    assert [row.event.subject for row in rows(store)] == ["13"]
    assert store.verify_audit()[0] is None


def test_rows_that_are_pruned_are_those_that_an_export_of_the_same_moment_has(store: SqlAccessStore) -> None:
    before = NOON + 4 * DAY
    exported = list(store.audit_until(before))
    assert [row.sequence for row in exported] == [1, 2, 3]
    store.prune_audit(before, 1000, PRUNE)
    left = rows(store)
    assert left[0].sequence == 4
    # The export's end is what the log's start is held against.
    assert (left[-1].event.subject, left[-1].event.reason) == ("3", exported[-1].hash)


def found(connection: sa.Connection) -> str:
    head, start = audit.audit_head(connection), audit.audit_start(connection)
    return verify(audit.iterate_audit(connection), head, start) or "nothing"


def forged_checkpoint(last: AuditRecord) -> str:
    """Return the statement that replaces the checkpoint, the log's last row, by one for row 6."""
    event = AuditEvent(
        last.event.at, AuditAction.AUDIT_PRUNED, AuditOutcome.NOTED, "service", "6", reason="0" * 64, count=6
    )
    own = chain_hash(last.previous_hash, 11, event)
    return (
        f"UPDATE audit SET subject = '6', reason = '{'0' * 64}', count = 6, hash = '{own}' "  # noqa: S608 - our own
        "WHERE sequence = 11"
    )


def test_tampering_with_a_pruned_log_is_located(store: SqlAccessStore, database: Database) -> None:
    store.prune_audit(NOON + 6 * DAY, 1000, PRUNE)
    left = rows(store)
    six = f"UPDATE access_state SET audit_pruned_sequence = 6, audit_pruned_hash = '{left[0].hash}'"  # noqa: S608 - see above
    cases: dict[str, list[str]] = {
        "Row 7 was changed": ["UPDATE audit SET actor = 'nobody' WHERE sequence = 7"],
        "Row 6 is missing": ["DELETE FROM audit WHERE sequence = 6"],
        "Row 11 is missing": ["DELETE FROM audit WHERE sequence = 11"],
        "Row 1 is missing": ["UPDATE access_state SET audit_pruned_sequence = 0"],
        "Row 5 was replaced": ["UPDATE access_state SET audit_pruned_hash = 'nothing'"],
        # One more row deleted, as `prune` would, but without a row that says so.
        "Row 11 says that the rows up to 5 were pruned, and the log begins behind row 6": [
            "DELETE FROM audit WHERE sequence = 6",
            six,
        ],
        "Row 11 was changed": [
            "DELETE FROM audit WHERE sequence = 6",
            six,
            "UPDATE audit SET subject = '6' WHERE sequence = 11",
        ],
        "Row 11 was replaced": ["DELETE FROM audit WHERE sequence = 6", six, forged_checkpoint(left[-1])],
        "Row 12 is the first, and no row says that those before it were pruned": [
            f"UPDATE access_state SET audit_pruned_sequence = 11, audit_pruned_hash = '{left[-1].hash}'",  # noqa: S608 - see above
            "DELETE FROM audit",
        ],
        # An old row put back, from an export.
        "Row 5 stands where row 6 belongs": [
            """INSERT INTO audit (sequence, at, action, outcome, actor, count, previous_hash, hash)
            SELECT 5, at, action, outcome, actor, count, previous_hash, hash FROM audit WHERE sequence = 6"""
        ],
    }
    triggers = (
        ["DROP TRIGGER audit_refuses_update", "DROP TRIGGER audit_refuses_delete"]
        if database.engine.dialect.name == "sqlite"
        else ["ALTER TABLE audit DISABLE TRIGGER ALL"]
    )
    for says, statements in cases.items():
        with database.engine.connect() as connection:
            if database.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN")
            for statement in (*triggers, *statements):
                connection.exec_driver_sql(statement)
            assert found(connection).startswith(says), says
            connection.rollback()
    assert store.verify_audit()[0] is None


def test_only_rows_below_a_logged_checkpoint_can_be_deleted(
    store: SqlAccessStore, database: Database
) -> None:
    store.prune_audit(NOON + 6 * DAY, 1000, PRUNE)
    for statement in ("DELETE FROM audit WHERE sequence = 6", "UPDATE audit SET actor = 'nobody'"):
        with (
            pytest.raises(sa.exc.DBAPIError, match="append-only"),
            database.engine.begin() as connection,
        ):
            connection.exec_driver_sql(statement)
    assert len(rows(store)) == 6


def test_a_log_that_is_pruned_while_it_is_written_is_one_chain(store: SqlAccessStore) -> None:
    until = NOON + 60 * DAY

    def write() -> None:
        for number in range(20):
            store.write([event(number % 5)], {})

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    pruned = 0
    while any(writer.is_alive() for writer in writers):
        pruned += store.prune_audit(until, 7, PRUNE)
    assert pruned > 0
    wrong, (sequence, _), (start, _) = store.verify_audit()
    assert wrong is None
    assert [row.sequence for row in rows(store)] == list(range(start + 1, sequence + 1))


def test_a_mark_of_a_row_that_was_pruned_is_no_older_log(store: SqlAccessStore, database: Database) -> None:
    records, old = SqlRecords(database), rows(store)
    store.prune_audit(NOON + 6 * DAY, 1000, PRUNE)
    assert records.audit_hash(3) == PRUNED
    assert records.audit_hash(5) == old[4].hash
    assert records.audit_hash(6) == old[5].hash
    assert records.audit_hash(12) is None


def test_the_service_prunes_by_itself_what_is_older_than_it_keeps(store: SqlAccessStore) -> None:
    now = datetime.now(UTC)
    store.write([AuditEvent(now, AuditAction.PROVISION, AuditOutcome.ACCEPTED, "local")], {})
    assert not AuditWriter(store).prune(now - (NOON + 7 * DAY + DAY / 2))
    assert [row.sequence for row in rows(store)] == [8, 9, 10, 11, 12]
    assert rows(store)[-1].event.actor == "service"
    assert store.verify_audit()[0] is None


def test_pruning_takes_some_rows_at_a_time_and_says_when_there_are_more(
    store: SqlAccessStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_writer, "ROWS_AT_A_TIME", 4)
    keep = datetime.now(UTC) - (NOON + 60 * DAY)
    assert AuditWriter(store).prune(keep)
    # The oldest four of ten went, and a row says so.
    assert [row.sequence for row in rows(store)] == [5, 6, 7, 8, 9, 10, 11]
    assert AuditWriter(store).prune(keep)
    assert not AuditWriter(store).prune(keep)


def test_a_hub_whose_log_was_pruned_meanwhile_starts_and_goes_on(
    hub_interface: HubInterface, start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """The mark beside wg0.conf names a row that is no longer there."""
    service = start_service(settings_for(hub_interface, tmp_path))
    for number in range(3):
        service.client.post(PROVISION, json=provision_body(f"node-{number}")).raise_for_status()
    service.terminate()
    whole = service.command("audit", "verify")
    count = int(whole.stdout.split()[1])

    # Two moments could let rows between them go unexported.
    refused = service.command("audit", "prune", "--older-than", "0", "--before", "2026-01-01")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    kept = service.command("audit", "prune")
    assert (kept.returncode, kept.stdout) == (0, "pruned 0 entries\n")
    file = tmp_path / "log.jsonl"
    exported = service.command("audit", "export", "--output", str(file))
    assert (exported.returncode, exported.stdout) == (0, f"exported {count} entries, up to {count}\n")
    assert file.stat().st_mode & 0o777 == 0o600
    entries: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["sequence"] for entry in entries] == list(range(1, count + 1))
    again = service.command("audit", "export", "--output", str(file))
    assert (again.returncode, "File exists" in again.stderr) == (1, True)
    assert len(file.read_text().splitlines()) == count

    pruned = service.command("audit", "prune", "--older-than", "0")
    assert (pruned.returncode, pruned.stdout) == (0, f"pruned {count} entries\n")
    whole = service.command("audit", "verify")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.startswith(f"whole: 1 entries, behind {count} that were pruned\n")
    (checkpoint,) = (json.loads(line) for line in service.command("audit", "list").stdout.splitlines())
    assert (checkpoint["subject"], checkpoint["reason"]) == (str(count), entries[-1]["hash"])
    assert checkpoint["actor"].startswith("cli:")

    service.start()
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    service.client.post(PROVISION, json=provision_body("node-9")).raise_for_status()
    assert "stepped_back" not in service.log
    assert service.command("audit", "verify").returncode == 0


def test_verify_beside_a_service_that_writes_on_takes_the_records_for_no_older_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would tell the operator of a busy hub to revoke credentials that are revoked."""
    settings = hub_settings(tmp_path) | {"ENABLE_DBOS": "true"}
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    mark = HubMark(Path(str(settings["WIREGUARD_CONFIG_PATH"])))
    verify_audit = SqlAccessStore.verify_audit

    def verify_and_go_on(store: SqlAccessStore) -> object:
        found = verify_audit(store)
        mark.write(Mark(generation=1, audit_sequence=1))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SqlAccessStore, "verify_audit", verify_and_go_on)
        beside = invoke("audit", "verify", directory=tmp_path, settings=settings)
    assert (beside.returncode, beside.stderr) == (0, "")
    # The mark is looked at, all the same.
    older = invoke("audit", "verify", directory=tmp_path, settings=settings)
    assert (older.returncode, "the hub has reached row 1" in older.stderr) == (1, True)
