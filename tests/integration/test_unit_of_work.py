"""Changes and all that belongs to them, in one transaction: on both databases, in a file and in memory."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.adapters.records import audit, credentials, idempotency
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import IN_MEMORY, Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import IdempotencyKeyError, NonceError, RecordsUnavailableError, UnauthenticatedError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome, AuditQuery
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import TokenRequest
from backend.models.access.idempotency import Answer
from backend.models.access.proof import Nonce
from backend.models.wireguard.peer import Change
from tests.harness.records import adding, removing
from tests.harness.requests import AUDIT, KEYS, PEERS, PROVISION, TOKENS, bearer, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.wireguard import HubInterface

ROOT = Path(__file__).parents[2]
# Where the functions are that a test makes fail.
MODULES = (audit, credentials, idempotency)


@pytest.fixture
def store(database: Database) -> SqlAccessStore:
    return SqlAccessStore(database)


def event(action: AuditAction, subject: str) -> AuditEvent:
    return SERVICE.event(datetime.now(UTC), action, AuditOutcome.ACCEPTED, subject)


def joining(number: int, token: str | None = None, key: str | None = None, body: str = "body") -> Change:
    """Return the change that adds a node, with all that belongs to it. `key` is its Idempotency-Key."""
    node = f"node-{number}"
    change = adding(node, f"10.0.0.{number + 2}", token_id=token)
    change.event = event(AuditAction.PROVISION, node)
    change.answer = Answer("service", key or f"key of {node}", body, node, b"{}", datetime.now(UTC))
    return change


def leaving(joined: Change) -> Change:
    change = removing(joined.peer)
    change.event = event(AuditAction.DEPROVISION, change.peer.node_id)
    return change


def make_token(store: SqlAccessStore, **asked: Any) -> str:
    token, _ = TokenRequest.model_validate(asked).make("cli:root", datetime.now(UTC))
    store.keep_credential(token, event(AuditAction.TOKEN_MADE, token.id))
    return token.id


def nodes(records: SqlRecords) -> list[str]:
    return [peer.node_id for peer in records.load().peers]


def uses(store: SqlAccessStore) -> dict[str, int]:
    return {token.id: token.uses for token in store.load_credentials()[1]}


def acts(store: SqlAccessStore) -> list[tuple[str, str | None]]:
    """Return what is on record but the making of tokens, the oldest first."""
    assert store.verify_audit()[0] is None
    found = [
        (record.event.action, record.event.subject) for record in store.audit_page(AuditQuery(limit=1000))
    ]
    return [(action.value, subject) for action, subject in reversed(found) if action != "token_made"]


def answered(store: SqlAccessStore, *numbers: int) -> list[bool]:
    return [store.find_answer("service", f"key of node-{number}") is not None for number in numbers]


def test_a_commit_has_its_peers_uses_answers_and_audit_rows(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=5)
    records.commit(1, 0, [joining(0, token), joining(1, token), joining(2)])
    assert nodes(records) == ["node-0", "node-1", "node-2"]
    assert [peer.token_id for peer in records.load().peers] == [token, token, None]
    assert uses(store) == {token: 2}
    assert answered(store, 0, 1, 2, 3) == [True, True, True, False]
    assert acts(store) == [("provision", "node-0"), ("provision", "node-1"), ("provision", "node-2")]


def fail(*_: object) -> None:
    raise sa.exc.OperationalError("no", None, Exception("power cut"))


@pytest.mark.parametrize("moment", ["count_uses", "forget_answers_of", "save_answers", "append_audit"])
@pytest.mark.parametrize("afterwards", [False, True])
def test_a_commit_that_fails_in_the_middle_leaves_nothing_of_itself(
    records: SqlRecords,
    store: SqlAccessStore,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    afterwards: bool,
) -> None:
    token = make_token(store, max_uses=5)
    first, gone = joining(0, token), joining(9)
    records.commit(1, 0, [first, gone])
    # The next commit ends the removal.
    records.commit(2, 1, [leaving(gone)])

    def found() -> tuple[object, ...]:
        return (records.load(), uses(store), acts(store), answered(store, 0, 1, 9))

    before = found()
    with monkeypatch.context() as patch:
        module = next(module for module in MODULES if hasattr(module, moment))
        work = getattr(module, moment)

        def work_and_fail(*arguments: Any) -> None:
            if afterwards:
                work(*arguments)
            fail()

        patch.setattr(module, moment, work_and_fail)
        with pytest.raises(RecordsUnavailableError, match="can't be written"):
            records.commit(3, 2, [joining(1, token), leaving(first)])
    assert found() == before
    records.commit(3, 2, [joining(1, token), leaving(first)])
    records.note_observed(3)
    assert (nodes(records), uses(store)) == (["node-1"], {token: 2})
    assert answered(store, 0, 1, 9) == [False, True, False]


def test_token_without_enough_uses_refuses_the_last_changes_of_the_batch(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    scarce, plenty = make_token(store, max_uses=2), make_token(store, max_uses=9)
    changes = [joining(number, token) for number, token in enumerate([scarce, plenty, scarce, scarce, None])]
    records.commit(1, 0, changes)
    refused = [change for change in changes if change.refusal is not None]
    assert [change.peer.node_id for change in refused] == ["node-3"]
    assert isinstance(refused[0].refusal, UnauthenticatedError)
    assert refused[0].refusal.args == ("used_up", scarce)
    assert nodes(records) == ["node-0", "node-1", "node-2", "node-4"]
    assert uses(store) == {scarce: 2, plenty: 1}
    assert answered(store, 2, 3) == [True, False]
    assert ("provision", "node-3") not in acts(store)


def signed(number: int, nonce: str, token: str | None = None) -> Change:
    """Return a node's coming with the nonce of its signature."""
    change = joining(number, token)
    change.nonce = Nonce("an identity", nonce, datetime.now(UTC) + timedelta(minutes=1))
    return change


def test_used_nonce_refuses_the_change_and_costs_no_token_use(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=9)
    records.commit(1, 0, [signed(0, "first", token)])
    replayed, new = signed(1, "first", token), signed(2, "second", token)
    # Two with one nonce that meet in a batch: one of them is a copy, and which of them is all the same.
    twice = [signed(3, "third", token), signed(4, "third", token)]
    records.commit(2, 1, [replayed, new, *twice])
    refusals = [change.refusal for change in (replayed, new, *twice)]
    assert [type(refusal) for refusal in refusals] == [NonceError, type(None), type(None), NonceError]
    assert nodes(records) == ["node-0", "node-2", "node-3"]
    assert uses(store) == {token: 3}
    assert answered(store, 1, 2, 3, 4) == [False, True, True, False]
    assert ("provision", "node-1") not in acts(store)


def test_a_nonce_stays_used_when_the_hub_could_not_be_updated(records: SqlRecords) -> None:
    changes = [signed(0, "first")]
    records.commit(1, 0, changes)
    records.compensate(1, changes, "`wg` failed")
    again = signed(1, "first")
    records.commit(2, 0, [again])
    assert isinstance(again.refusal, NonceError)
    assert nodes(records) == []


def test_a_commit_that_fails_in_the_middle_uses_no_nonce_up(
    records: SqlRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(idempotency, "save_answers", fail)
        with pytest.raises(RecordsUnavailableError):
            records.commit(1, 0, [signed(0, "first")])
    records.commit(1, 0, [signed(0, "first")])
    assert nodes(records) == ["node-0"]


@pytest.mark.parametrize("end", ["revoked", "expired", "unknown"])
def test_token_that_ends_before_the_commit_refuses_the_change(
    records: SqlRecords, database: Database, store: SqlAccessStore, end: str
) -> None:
    token = make_token(store, max_uses=5)
    if end == "revoked":
        store.revoke_credential(token, event(AuditAction.TOKEN_REVOKED, token))
    elif end == "expired":
        with database.engine.begin() as connection:
            past = datetime.now(UTC) - timedelta(seconds=1)
            connection.execute(sa.update(credentials.credentials).values(expires_at=past))
    changes = [joining(0, "0123456789abcdef" if end == "unknown" else token), joining(1)]
    records.commit(1, 0, changes)
    assert [change.refusal is None for change in changes] == [False, True]
    assert nodes(records) == ["node-1"]
    assert uses(store) == {token: 0}


def test_a_change_that_a_constraint_refuses_uses_no_token(records: SqlRecords, store: SqlAccessStore) -> None:
    token = make_token(store, max_uses=5)
    records.commit(1, 0, [joining(0)])
    twice = joining(0, token)
    records.commit(2, 1, [twice, joining(1, token)])
    assert twice.refusal is not None
    assert uses(store) == {token: 1}
    assert acts(store) == [("provision", "node-0"), ("provision", "node-1")]


def test_compensating_returns_uses_keeps_answers_of_peers_that_stay_and_is_logged(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=3)
    first = joining(0, token)
    records.commit(1, 0, [first])
    changes = [joining(1, token), leaving(first), joining(2, token), joining(3, token)]
    records.commit(2, 1, changes)
    assert (nodes(records), uses(store)) == (["node-1", "node-2"], {token: 3})
    records.compensate(2, changes[:3], "the device is on fire")
    assert (nodes(records), uses(store)) == (["node-0"], {token: 1})
    # Nothing was changed: what node-0 was told holds.
    assert answered(store, 0, 1, 2, 3) == [True, False, False, False]
    assert acts(store) == [
        ("provision", "node-0"),
        ("provision", "node-1"),
        ("deprovision", "node-0"),
        ("provision", "node-2"),
        ("revert", "node-1"),
        ("revert", "node-0"),
        ("revert", "node-2"),
    ]
    (newest, *_) = store.audit_page(AuditQuery(limit=1))
    assert (newest.event.outcome, newest.event.actor) == (AuditOutcome.NOTED, "service")
    assert newest.event.reason == "the device is on fire"
    # Nor later, when the row of a removed peer would go.
    records.note_observed(2)
    assert answered(store, 0) == [True]


@pytest.mark.parametrize("moment", ["return_uses", "forget_answers_of", "append_audit"])
def test_compensating_that_fails_in_the_middle_takes_nothing_back(
    records: SqlRecords, store: SqlAccessStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    token = make_token(store, max_uses=3)
    changes = [joining(0, token)]
    records.commit(1, 0, changes)
    before = (nodes(records), uses(store), acts(store), answered(store, 0))
    with monkeypatch.context() as patch:
        patch.setattr(next(module for module in MODULES if hasattr(module, moment)), moment, fail)
        with pytest.raises(RecordsUnavailableError, match="can't be written"):
            records.compensate(1, changes, "no")
    assert (nodes(records), uses(store), acts(store), answered(store, 0)) == before
    records.compensate(1, changes, "no")
    assert (nodes(records), uses(store), answered(store, 0)) == ([], {token: 0}, [False])


def test_a_batch_that_the_hub_has_is_not_taken_back(records: SqlRecords, store: SqlAccessStore) -> None:
    token = make_token(store)
    changes = [joining(0, token)]
    records.commit(1, 0, changes)
    records.note_observed(1)
    records.compensate(1, changes, "too late")
    assert (nodes(records), uses(store), acts(store)) == (["node-0"], {token: 1}, [("provision", "node-0")])


def test_answers_of_a_removed_node_go_with_its_row_and_no_use_comes_back(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=2)
    first = joining(0, token)
    records.commit(1, 0, [first, joining(1, token)])
    records.commit(2, 1, [leaving(first)])
    late = joining(2, token)
    records.commit(3, 2, [late])
    assert late.refusal is not None
    assert answered(store, 0, 1) == [False, True]
    assert uses(store) == {token: 2}


def test_an_idempotency_key_that_came_with_another_request_is_refused_in_the_commit(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=9)
    records.commit(1, 0, [joining(0, token, "key")])
    taken, fine = joining(1, token, "key", "another body"), joining(2, token, "another key")
    # Two with one key that meet in a batch: the first has it.
    first, second = joining(3, token, "twice"), joining(4, token, "twice", "another body")
    # A key is its caller's own.
    other = joining(5, token, "key")
    other.answer = other.answer and replace(other.answer, scope="token:another")
    changes = [taken, fine, first, second, other]
    records.commit(2, 1, changes)
    assert [type(change.refusal) for change in changes] == [
        IdempotencyKeyError,
        type(None),
        type(None),
        IdempotencyKeyError,
        type(None),
    ]
    assert nodes(records) == ["node-0", "node-2", "node-3", "node-5"]
    assert uses(store) == {token: 4}
    assert ("provision", "node-1") not in acts(store)
    answer = store.find_answer("service", "twice")
    assert answer is not None
    assert answer.node_id == "node-3"


def test_the_idempotency_key_of_a_removed_node_may_come_with_another_request_in_the_next_commit(
    records: SqlRecords, store: SqlAccessStore
) -> None:
    first = joining(0, key="key")
    records.commit(1, 0, [first])
    records.commit(2, 1, [leaving(first)])
    again = joining(1, key="key", body="another body")
    records.commit(3, 2, [again])
    assert again.refusal is None
    answer = store.find_answer("service", "key")
    assert answer is not None
    assert answer.node_id == "node-1"


def test_records_in_memory_need_no_room_on_any_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(IN_MEMORY)
    database.migrate()

    class FullDisk:
        f_bavail, f_frsize = 0, 4096

    monkeypatch.setattr("backend.adapters.records.sqlite.os.statvfs", lambda _: FullDisk)
    SqlRecords(database).check()
    database.close()


def test_records_that_are_away_are_named_as_such(database: Database, store: SqlAccessStore) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE access_state")
    for call in (store.load_credentials, store.credentials_version, store.verify_audit):
        with pytest.raises(RecordsUnavailableError, match="can't be read"):
            call()
    with pytest.raises(RecordsUnavailableError, match="can't be written"):
        store.write([event(AuditAction.PROVISION, "node-1")], {})


def command(url: str, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "backend", *arguments],
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "DATABASE_URL": url,
            "STATE_DIRECTORY": str(directory / "state"),
        },
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("url", ["file", "postgresql"], indirect=True)
def test_another_process_that_writes_the_log_between_batches_keeps_it_whole(
    records: SqlRecords, store: SqlAccessStore, url: str, tmp_path: Path
) -> None:
    token = make_token(store, max_uses=10_000)
    commands = [command(url, tmp_path, "token", "create") for _ in range(3)]
    generation = 0
    joined: dict[int, Change] = {}
    while generation < 20 or any(process.poll() is None for process in commands):
        number = generation % 200
        if number in joined:
            change = leaving(joined.pop(number))
        else:
            change = joined[number] = joining(number, token)
        records.commit(generation + 1, generation, [change])
        assert change.refusal is None
        generation += 1
    for process in commands:
        assert (process.communicate()[1], process.returncode) == ("", 0)
    wrong, (sequence, _), _ = store.verify_audit()
    assert wrong is None
    assert sequence == generation + 1 + len(commands)
    assert len(store.load_credentials()[1]) == 1 + len(commands)


def test_records_in_memory_have_a_door_too_and_forget_it_with_the_process(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, ENABLE_DBOS="false"))
    key = service.client.post(KEYS, json={"role": "admin"}).json()["secret"]
    admin = bearer(key)
    assert service.client.get(PEERS, auth=None).status_code == 401
    token = service.client.post(TOKENS, json={}, headers=admin).json()["secret"]
    node = bearer(token)
    answers = [
        service.client.post(PROVISION, json=provision_body(name), headers=node).status_code
        for name in ("node-1", "node-2")
    ]
    assert answers == [200, 401]
    entries = service.client.get(AUDIT, headers=admin).json()["entries"]
    assert [entry["action"] for entry in entries if entry["outcome"] == "accepted"] == [
        "provision",
        "token_made",
        "key_made",
    ]
    assert "used_up" in {entry["reason"] for entry in entries}
    service.restart()
    assert set(listed(service)) == {"node-1"}
    assert service.client.get(TOKENS).json() == service.client.get(KEYS).json() == []
    assert service.client.get(PEERS, headers=admin).status_code == 401
    assert service.client.post(PROVISION, json=provision_body("node-2")).status_code == 200
    assert set(assert_in_step(service, hub_interface)) == {"node-1", "node-2"}
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["admin.header"]
