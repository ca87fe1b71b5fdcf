"""A batch and all that belongs to it, in one transaction: on both databases, in a file and in memory."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.adapters.records import audit, credentials, idempotency
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import IN_MEMORY, Database
from backend.adapters.records.sql_journal import SqlJournal
from backend.errors import NonceError, RecordsUnavailableError, UnauthenticatedError
from backend.models.access.answers import Answer
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome, AuditQuery
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import TokenRequest
from backend.models.access.nonces import Nonce
from backend.services.ports import Batch, Change
from tests.harness.requests import AUDIT, KEYS, PEERS, PROVISION, TOKENS, bearer, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.wireguard import HubInterface
from tests.integration.test_records import adding, removing

ROOT = Path(__file__).parents[2]
# Where the functions are that a test makes fail.
MODULES = (audit, credentials, idempotency)


@pytest.fixture(params=["file", "memory", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"sqlite:///{tmp_path}/state/provisioning.sqlite"
    if request.param == "memory":
        return IN_MEMORY
    address: str = request.getfixturevalue("postgres_database")
    return address


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def journal(database: Database) -> SqlJournal:
    return SqlJournal(database)


@pytest.fixture
def store(database: Database) -> SqlAccessStore:
    return SqlAccessStore(database)


def event(action: AuditAction, subject: str) -> AuditEvent:
    return SERVICE.event(datetime.now(UTC), action, AuditOutcome.ACCEPTED, subject)


def joining(number: int, token: str | None = None) -> Change:
    """Return a node's coming with all that belongs to it."""
    node = f"node-{number}"
    change = adding(node, f"10.0.0.{number + 2}")
    change.peer = replace(change.peer, token_id=token)
    change.event = event(AuditAction.PROVISION, node)
    change.answer = Answer("service", f"key of {node}", "body", node, b"{}", datetime.now(UTC))
    return change


def leaving(number: int) -> Change:
    change = removing(f"node-{number}")
    change.event = event(AuditAction.DEPROVISION, f"node-{number}")
    return change


def make_token(store: SqlAccessStore, **asked: Any) -> str:
    token, _ = TokenRequest.model_validate(asked).make("cli:root", datetime.now(UTC))
    store.keep_credential(token, event(AuditAction.TOKEN_MADE, token.id))
    return token.id


def nodes(journal: SqlJournal) -> list[str]:
    return [peer.node_id for peer in journal.load().peers]


def uses(store: SqlAccessStore) -> dict[str, int]:
    return {token.id: token.uses for token in store.load_credentials()[1]}


def acts(store: SqlAccessStore) -> list[tuple[str, str | None]]:
    """Return what is on record but the making of tokens, the oldest first."""
    assert store.verify_audit()[0] is None
    found = [(record.event.action, record.event.subject) for record in store.audit_page(AuditQuery(1000))]
    return [(action.value, subject) for action, subject in reversed(found) if action != "token_made"]


def answered(store: SqlAccessStore, *numbers: int) -> list[bool]:
    return [store.find_answer("service", f"key of node-{number}") is not None for number in numbers]


def test_an_intent_has_its_peers_uses_answers_and_audit_rows(
    journal: SqlJournal, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=5)
    journal.intend(Batch(1, 0, [joining(0, token), joining(1, token), joining(2)]))
    assert nodes(journal) == ["node-0", "node-1", "node-2"]
    assert [peer.token_id for peer in journal.load().peers] == [token, token, None]
    assert uses(store) == {token: 2}
    assert answered(store, 0, 1, 2, 3) == [True, True, True, False]
    assert acts(store) == [("provision", "node-0"), ("provision", "node-1"), ("provision", "node-2")]


def fail(*_: object) -> None:
    raise sa.exc.OperationalError("no", None, Exception("power cut"))


@pytest.mark.parametrize("moment", ["count_uses", "forget_answers_of", "save_answers", "append_audit"])
@pytest.mark.parametrize("afterwards", [False, True])
def test_an_intent_that_fails_in_the_middle_leaves_nothing_of_itself(
    journal: SqlJournal,
    store: SqlAccessStore,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    afterwards: bool,
) -> None:
    token = make_token(store, max_uses=5)
    journal.intend(Batch(1, 0, [joining(0, token)]))
    before = (nodes(journal), journal.load().generation, uses(store), acts(store))
    with monkeypatch.context() as patch:
        module = next(module for module in MODULES if hasattr(module, moment))
        work = getattr(module, moment)

        def work_and_fail(*arguments: Any) -> None:
            if afterwards:
                work(*arguments)
            fail()

        patch.setattr(module, moment, work_and_fail)
        with pytest.raises(sa.exc.OperationalError):
            journal.intend(Batch(2, 1, [joining(1, token), leaving(0)]))
    assert (nodes(journal), journal.load().generation, uses(store), acts(store)) == before
    assert answered(store, 0, 1) == [True, False]
    journal.intend(Batch(2, 1, [joining(1, token), leaving(0)]))
    assert (nodes(journal), uses(store)) == (["node-1"], {token: 2})
    assert answered(store, 0, 1) == [False, True]


def test_a_token_that_is_short_refuses_the_last_who_came_and_leaves_them_out(
    journal: SqlJournal, store: SqlAccessStore
) -> None:
    scarce, plenty = make_token(store, max_uses=2), make_token(store, max_uses=9)
    changes = [joining(number, token) for number, token in enumerate([scarce, plenty, scarce, scarce, None])]
    journal.intend(Batch(1, 0, changes))
    refused = [change for change in changes if change.refusal is not None]
    assert [change.peer.node_id for change in refused] == ["node-3"]
    assert isinstance(refused[0].refusal, UnauthenticatedError)
    assert refused[0].refusal.args == ("used_up", scarce)
    assert nodes(journal) == ["node-0", "node-1", "node-2", "node-4"]
    assert uses(store) == {scarce: 2, plenty: 1}
    assert answered(store, 2, 3) == [True, False]
    assert ("provision", "node-3") not in acts(store)


def signed(number: int, nonce: str, token: str | None = None) -> Change:
    """Return a node's coming with the nonce of its signature."""
    change = joining(number, token)
    change.nonce = Nonce("an identity", nonce, datetime.now(UTC) + timedelta(minutes=1))
    return change


def test_a_nonce_that_was_used_before_lets_nobody_in_and_costs_no_use(
    journal: SqlJournal, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=9)
    journal.intend(Batch(1, 0, [signed(0, "first", token)]))
    replayed, new = signed(1, "first", token), signed(2, "second", token)
    # Two with one nonce that meet in a batch: one of them is a copy, and which of them is all the same.
    twice = [signed(3, "third", token), signed(4, "third", token)]
    journal.intend(Batch(2, 1, [replayed, new, *twice]))
    refusals = [change.refusal for change in (replayed, new, *twice)]
    assert [type(refusal) for refusal in refusals] == [NonceError, type(None), type(None), NonceError]
    assert nodes(journal) == ["node-0", "node-2", "node-3"]
    assert uses(store) == {token: 3}
    assert answered(store, 1, 2, 3, 4) == [False, True, True, False]
    assert ("provision", "node-1") not in acts(store)


def test_a_nonce_stays_used_when_the_hub_could_not_be_updated(journal: SqlJournal) -> None:
    batch = Batch(1, 0, [signed(0, "first")])
    batch.failure = "`wg` failed"
    journal.intend(batch)
    journal.revoke(batch)
    again = signed(1, "first")
    journal.intend(Batch(2, 1, [again]))
    assert isinstance(again.refusal, NonceError)
    assert nodes(journal) == []


def test_an_intent_that_fails_in_the_middle_uses_no_nonce_up(
    journal: SqlJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(idempotency, "save_answers", fail)
        with pytest.raises(sa.exc.OperationalError):
            journal.intend(Batch(1, 0, [signed(0, "first")]))
    journal.intend(Batch(1, 0, [signed(0, "first")]))
    assert nodes(journal) == ["node-0"]


@pytest.mark.parametrize("end", ["revoked", "expired", "unknown"])
def test_a_token_that_is_over_by_the_time_of_the_batch_lets_nobody_in(
    journal: SqlJournal, database: Database, store: SqlAccessStore, end: str
) -> None:
    token = make_token(store, max_uses=5)
    if end == "revoked":
        store.revoke_credential(token, event(AuditAction.TOKEN_REVOKED, token))
    elif end == "expired":
        with database.engine.begin() as connection:
            past = datetime.now(UTC) - timedelta(seconds=1)
            connection.execute(sa.update(credentials.credentials).values(expires_at=past))
    changes = [joining(0, "0123456789abcdef" if end == "unknown" else token), joining(1)]
    journal.intend(Batch(1, 0, changes))
    assert [change.refusal is None for change in changes] == [False, True]
    assert nodes(journal) == ["node-1"]
    assert uses(store) == {token: 0}


def test_a_change_that_a_constraint_refuses_uses_no_token(journal: SqlJournal, store: SqlAccessStore) -> None:
    token = make_token(store, max_uses=5)
    journal.intend(Batch(1, 0, [joining(0)]))
    twice = joining(0, token)
    journal.intend(Batch(2, 1, [twice, joining(1, token)]))
    assert twice.refusal is not None
    assert uses(store) == {token: 1}
    assert acts(store) == [("provision", "node-0"), ("provision", "node-1")]


def test_a_batch_that_is_taken_back_leaves_its_story_alone(
    journal: SqlJournal, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=3)
    journal.intend(Batch(1, 0, [joining(0, token)]))
    batch = Batch(2, 1, [joining(1, token), leaving(0), joining(2, token), joining(3, token)])
    journal.intend(batch)
    assert (nodes(journal), uses(store)) == (["node-1", "node-2"], {token: 3})
    batch.failure = "the device is on fire"
    journal.revoke(batch)
    assert (nodes(journal), uses(store)) == (["node-0"], {token: 1})
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
    (newest, *_) = store.audit_page(AuditQuery(1))
    assert (newest.event.outcome, newest.event.actor) == (AuditOutcome.NOTED, "service")
    assert newest.event.reason == "the device is on fire"


@pytest.mark.parametrize("moment", ["return_uses", "forget_answers_of", "save_answers", "append_audit"])
def test_a_taking_back_that_fails_in_the_middle_takes_nothing_back(
    journal: SqlJournal, store: SqlAccessStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    token = make_token(store, max_uses=3)
    batch = Batch(1, 0, [joining(0, token)])
    journal.intend(batch)
    before = (nodes(journal), uses(store), acts(store), answered(store, 0))
    with monkeypatch.context() as patch:
        patch.setattr(next(module for module in MODULES if hasattr(module, moment)), moment, fail)
        with pytest.raises(sa.exc.OperationalError):
            journal.revoke(batch)
    assert (nodes(journal), uses(store), acts(store), answered(store, 0)) == before
    journal.revoke(batch)
    assert (nodes(journal), uses(store), answered(store, 0)) == ([], {token: 0}, [False])


def test_a_batch_that_the_hub_has_is_not_taken_back(journal: SqlJournal, store: SqlAccessStore) -> None:
    token = make_token(store)
    batch = Batch(1, 0, [joining(0, token)])
    journal.intend(batch)
    journal.mark_applied(1)
    journal.revoke(batch)
    assert (nodes(journal), uses(store), acts(store)) == (["node-0"], {token: 1}, [("provision", "node-0")])


def test_a_node_that_goes_takes_its_answers_with_it_and_no_use_comes_back(
    journal: SqlJournal, store: SqlAccessStore
) -> None:
    token = make_token(store, max_uses=2)
    journal.intend(Batch(1, 0, [joining(0, token), joining(1, token)]))
    journal.intend(Batch(2, 1, [leaving(0)]))
    assert answered(store, 0, 1) == [False, True]
    assert uses(store) == {token: 2}
    late = joining(2, token)
    journal.intend(Batch(3, 2, [late]))
    assert late.refusal is not None


def test_records_in_memory_need_no_room_on_any_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(IN_MEMORY)
    database.migrate()

    class FullDisk:
        f_bavail, f_frsize = 0, 4096

    monkeypatch.setattr("backend.adapters.records.database.os.statvfs", lambda _: FullDisk)
    SqlJournal(database).check()
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
    journal: SqlJournal, store: SqlAccessStore, url: str, tmp_path: Path
) -> None:
    token = make_token(store, max_uses=10_000)
    commands = [command(url, tmp_path, "token", "create") for _ in range(3)]
    generation = 0
    while generation < 20 or any(process.poll() is None for process in commands):
        change = joining(generation % 200, token)
        if change.peer.node_id in nodes(journal):
            change = leaving(generation % 200)
        journal.intend(Batch(generation + 1, generation, [change]))
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
