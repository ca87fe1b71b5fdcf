"""Whom the door lets in by what it knows, and what its clerk writes down of the others."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError

from backend import errors
from backend.api.audit import _reason
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import (
    Credential,
    CredentialKind,
    KeyRequest,
    Permission,
    Role,
    Secret,
    TokenRequest,
)
from backend.services.access import audit_writer as clerk_module
from backend.services.access.audit_writer import Clerk
from backend.services.access.authenticator import Door
from backend.services.ports import LimitKind
from tests.harness.fakes import FakeAccessStore, NoLimits
from tests.harness.patience import eventually

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
SOMEWHERE = "192.0.2.1"


class CountingStore(FakeAccessStore):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.loads = 0

    def credentials_version(self) -> int:
        self.looks += 1
        return super().credentials_version()

    def load_credentials(self) -> tuple[int, list[Credential]]:
        self.loads += 1
        return super().load_credentials()


class Limits(NoLimits):
    """Notes what is counted, and says no to those in `full`."""

    def __init__(self) -> None:
        self.hits: list[tuple[LimitKind, str]] = []
        self.full: set[LimitKind] = set()

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        self.hits.append((kind, who))
        return 7 if kind in self.full else None


class World:
    """A door with everything around it that a test may look at."""

    def __init__(self, store: CountingStore | None = None) -> None:
        self.store = store or CountingStore()
        self.clerk = Clerk(self.store)
        self.limits = Limits()
        local, self.local = KeyRequest(role=Role.ADMIN).make("service", datetime.now(UTC))
        self.door = Door(self.store, self.clerk, self.limits, local=local)
        self.door.refresh()

    def made(self, request: TokenRequest | KeyRequest, at: datetime | None = None) -> Secret:
        """Make a credential as the command line does, behind the door's back."""
        credential, secret = request.make("cli:root", at or datetime.now(UTC))
        self.store.keep_credential(credential, event())
        return secret

    def admit(self, secret: Secret | None = None, *, source: str | None = SOMEWHERE) -> Caller:
        shown = None if secret is None else f"Bearer {secret.reveal()}"
        return asyncio.run(self.door.admit(shown, source, "r-1"))

    def refused(self, secret: Secret | None = None, **asked: Any) -> tuple[str, str | None]:
        """Return why nobody is let in, and whose credential it was."""
        with pytest.raises(errors.UnauthenticatedError) as caught:
            self.admit(secret, **asked)
        return caught.value.reason, caught.value.credential_id


def event(subject: str | None = None, **over: Any) -> AuditEvent:
    base = AuditEvent(NOON, AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, "nobody", subject)
    return replace(base, **over)


@pytest.fixture
def world() -> World:
    return World()


def test_without_any_credential_nobody_is_let_in_but_this_hosts_admin(world: World) -> None:
    caller = world.admit(world.local, source="127.0.0.1")
    assert (caller.kind, caller.name, caller.request_id) == (CallerKind.LOCAL, "local", "r-1")
    for permission in Permission:
        world.door.require(caller, permission)
    for source in ("127.0.0.1", "::1", None, SOMEWHERE):
        assert world.refused(source=source) == ("missing", None)
        assert world.refused(Secret.generate(), source=source) == ("unknown", None)
    assert world.refused(Secret(world.local.id, Secret.generate()._secret)) == ("unknown", None)
    assert world.admit(world.local, source=None).name == "local"


def test_this_hosts_admin_is_in_no_record(world: World) -> None:
    caller = world.admit(world.local)
    world.clerk.write()
    assert not world.store.credentials
    assert not world.store.used
    assert world.door.listed(CredentialKind.KEY) == []
    with pytest.raises(errors.CredentialNotFoundError):
        world.door.revoke(CredentialKind.KEY, world.local.id, caller)
    assert world.admit(world.local).name == "local"


def test_where_nothing_is_asked_for_every_caller_may_all_but_make_credentials() -> None:
    store = FakeAccessStore()
    key, secret = KeyRequest(role=Role.ADMIN).make("cli:root", datetime.now(UTC))
    store.keep_credential(key, event())
    door = Door(store, Clerk(store), NoLimits(), asks=False)
    door.refresh()
    for shown in (None, "Basic of-the-app-around-it", f"Bearer {secret.reveal()}"):
        caller = asyncio.run(door.admit(shown, SOMEWHERE, "r-1"))
        assert (caller.kind, caller.name, caller.operates) == (CallerKind.ANYONE, "anyone", True)
        for permission in set(Permission) - {Permission.ADMINISTER}:
            door.require(caller, permission)
        with pytest.raises(errors.AuthenticationOffError, match="WIREGUARD_AUTH=off"):
            door.require(caller, Permission.ADMINISTER)
    assert any("WIREGUARD_AUTH=off" in notice for notice in door.notices)


def test_a_credential_from_the_command_line_is_known_as_soon_as_it_is_shown(world: World) -> None:
    secret = world.made(KeyRequest(role=Role.OPERATE))
    assert world.admit(secret).name == f"key:{secret.id}"


def test_whom_it_knows_and_what_is_no_credential_costs_no_look(world: World) -> None:
    secret = world.made(KeyRequest(role=Role.ADMIN))
    world.door.refresh()
    before = world.store.looks
    for _ in range(10):
        world.admit(secret)
        with pytest.raises(errors.UnauthenticatedError):
            asyncio.run(world.door.admit("Bearer x", SOMEWHERE, "r-1"))
    assert world.store.looks == before


def test_a_revocation_counts_from_the_next_refresh(world: World) -> None:
    secret = world.made(KeyRequest(role=Role.ADMIN))
    world.door.refresh()
    world.store.revoke_credential(secret.id, event(at=datetime.now(UTC)))
    assert world.admit(secret).credential is not None
    world.door.refresh()
    assert world.refused(secret) == ("revoked", secret.id)


def test_a_refresh_reads_the_credentials_only_where_there_are_others(world: World) -> None:
    loads = world.store.loads
    for _ in range(5):
        world.door.refresh()
    assert world.store.loads == loads
    world.made(TokenRequest())
    for _ in range(5):
        world.door.refresh()
    assert world.store.loads == loads + 1


def test_records_that_are_away_keep_nobody_out_who_is_known(world: World) -> None:
    secret = world.made(KeyRequest(role=Role.ADMIN))
    world.door.refresh()
    world.store.away = True
    assert world.admit(secret).name == f"key:{secret.id}"
    with pytest.raises(errors.RecordsUnavailableError):
        world.admit(Secret.generate())
    with pytest.raises(errors.RecordsUnavailableError):
        world.door.make(TokenRequest(), world.admit(secret))


def test_what_a_credential_is_refused_for(world: World) -> None:
    now = datetime.now(UTC)
    from_there = TokenRequest.model_validate({"source_cidr": "203.0.113.0/24"})
    expired = world.made(TokenRequest(expires_in=60), at=now - timedelta(seconds=61))
    key = world.made(KeyRequest(role=Role.READ))
    elsewhere = world.made(from_there)
    world.door.refresh()
    assert world.refused(expired) == ("expired", expired.id)
    assert world.refused(elsewhere) == ("source", elsewhere.id)
    # A UNIX socket is in no network.
    assert world.refused(elsewhere, source=None) == ("source", elsewhere.id)
    assert world.admit(elsewhere, source="::ffff:203.0.113.9").token_id == elsewhere.id
    # The ID is no secret; what belongs to it is.
    assert world.refused(Secret(key.id, Secret.generate()._secret)) == ("secret", key.id)


def test_a_tokens_pattern_is_asked_when_the_nodes_name_is_known(world: World) -> None:
    secret = world.made(TokenRequest(node_id_pattern="swarm-*"))
    caller = world.admit(secret)
    world.door.check_node(caller, "swarm-1")
    with pytest.raises(errors.UnauthenticatedError) as caught:
        world.door.check_node(caller, "other-1")
    assert (caught.value.reason, caught.value.credential_id) == ("node_id", secret.id)


@pytest.mark.parametrize(
    ("role", "may"),
    [
        (Role.READ, {Permission.READ}),
        (Role.OPERATE, {Permission.READ, Permission.OPERATE, Permission.PROVISION}),
        (Role.ADMIN, set(Permission)),
    ],
)
def test_a_key_may_what_its_role_is_for(world: World, role: Role, may: set[Permission]) -> None:
    caller = world.admit(world.made(KeyRequest(role=role)))
    for permission in may:
        world.door.require(caller, permission)
    for permission in set(Permission) - may:
        with pytest.raises(errors.ForbiddenError, match=f"role {permission.role}"):
            world.door.require(caller, permission)


def test_a_token_that_is_used_up_is_told_nothing_that_an_unknown_one_is_not(world: World) -> None:
    secret = world.made(TokenRequest(max_uses=2))
    caller = world.admit(secret)
    for used in range(3):
        assert world.door.used_up(caller) == (used >= 2)
        expected = errors.UnauthenticatedError if used >= 2 else errors.ForbiddenError
        with pytest.raises(expected):
            world.door.require(caller, Permission.READ)
        world.door.count_use(caller.token_id)
    # To ask again what it was used for, it comes as far as this.
    world.door.require(caller, Permission.PROVISION)
    world.door.count_use(None)
    assert not world.door.used_up(world.admit(world.local))


def test_the_records_know_of_uses_that_were_counted_elsewhere_and_never_of_fewer(world: World) -> None:
    secret = world.made(TokenRequest(max_uses=3))
    caller = world.admit(secret)
    for _ in range(2):
        world.door.count_use(secret.id)
    # A load that began before the records had counted these must not give them back.
    world.door.listed(CredentialKind.TOKEN)
    world.door.count_use(secret.id)
    assert world.door.used_up(caller)
    other = world.made(TokenRequest(max_uses=3))
    world.store.credentials[other.id] = replace(world.store.credentials[other.id], uses=3)
    world.door.refresh()
    assert world.door.used_up(world.admit(other))


def test_uses_that_are_counted_at_once_are_all_counted(world: World) -> None:
    secret = world.made(TokenRequest(max_uses=4001))
    caller = world.admit(secret)

    def count() -> None:
        for _ in range(1000):
            world.door.count_use(secret.id)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not world.door.used_up(caller)
    world.door.count_use(secret.id)
    assert world.door.used_up(caller)


def test_what_is_made_and_revoked_is_logged_with_it(world: World) -> None:
    admin, secret = world.door.make(KeyRequest(role=Role.ADMIN), world.admit(world.local))
    caller = world.admit(secret)
    token, _ = world.door.make(TokenRequest(), caller)
    world.door.revoke(CredentialKind.TOKEN, token.id, caller)
    for kind, name in ((CredentialKind.KEY, token.id), (CredentialKind.TOKEN, "0" * 16)):
        with pytest.raises(errors.CredentialNotFoundError, match=f"{kind.value} {name} not found"):
            world.door.revoke(kind, name, caller)
    assert [(logged.action, logged.actor, logged.subject) for logged in world.store.events] == [
        (AuditAction.KEY_MADE, "local", admin.id),
        (AuditAction.TOKEN_MADE, caller.name, token.id),
        (AuditAction.TOKEN_REVOKED, caller.name, token.id),
    ]
    assert {logged.outcome for logged in world.store.events} == {AuditOutcome.ACCEPTED}
    assert {logged.request_id for logged in world.store.events} == {"r-1"}
    assert [found.id for found in world.door.listed(CredentialKind.KEY)] == [admin.id]
    assert secret.reveal().rpartition("_")[2] not in repr(world.store.events)


def test_what_is_counted_for_whom(world: World) -> None:
    key, token = world.made(KeyRequest(role=Role.ADMIN)), world.made(TokenRequest())
    world.door.refresh()
    world.admit(key)
    world.admit(token, source="127.0.0.1")
    world.refused()
    world.refused(Secret.generate(), source=None)
    assert world.limits.hits == [
        (LimitKind.SOURCE, SOMEWHERE),
        (LimitKind.KEY, key.id),
        (LimitKind.SOURCE, "127.0.0.1"),
        (LimitKind.TOKEN, token.id),
        (LimitKind.SOURCE, SOMEWHERE),
        (LimitKind.FAILED_AUTHENTICATION, SOMEWHERE),
        (LimitKind.FAILED_AUTHENTICATION, "unix"),
    ]


@pytest.mark.parametrize("kind", [LimitKind.SOURCE, LimitKind.TOKEN])
def test_who_comes_too_often_has_to_wait(world: World, kind: LimitKind) -> None:
    secret = world.made(TokenRequest())
    world.limits.full = {kind}
    with pytest.raises(errors.RateLimitedError) as caught:
        world.admit(secret)
    assert caught.value.retry_after == 7


def test_who_fails_too_often_has_to_wait_and_who_does_not_fail_comes_in(world: World) -> None:
    secret = world.made(KeyRequest(role=Role.READ))
    world.door.refresh()
    world.limits.full = {LimitKind.FAILED_AUTHENTICATION}
    for failed in (None, Secret.generate(), Secret(secret.id, Secret.generate()._secret)):
        with pytest.raises(errors.RateLimitedError):
            world.admit(failed)
    assert world.admit(secret).name == f"key:{secret.id}"


def test_a_token_that_is_used_up_counts_as_a_failure_of_its_source_and_of_itself(world: World) -> None:
    """Otherwise its holder has bodies read and compared as often as it likes, until the token expires."""
    secret = world.made(TokenRequest(max_uses=1))
    assert not world.admit(secret).used_up
    world.door.count_use(secret.id)
    world.limits.hits.clear()
    assert world.admit(secret).used_up
    assert world.admit(secret, source=None).used_up
    failures = [who for kind, who in world.limits.hits if kind is LimitKind.FAILED_AUTHENTICATION]
    assert failures == [SOMEWHERE, secret.id, "unix", secret.id]
    world.limits.full = {LimitKind.FAILED_AUTHENTICATION}
    with pytest.raises(errors.RateLimitedError):
        world.admit(secret)


def test_a_keys_last_use_is_noted_and_a_tokens_is_counted_by_the_records(world: World) -> None:
    key, token = world.made(KeyRequest(role=Role.READ)), world.made(TokenRequest())
    world.admit(key)
    world.admit(token)
    world.clerk.write()
    assert set(world.store.used) == {key.id}
    assert datetime.now(UTC) - world.store.used[key.id] < timedelta(minutes=1)


def rows(clerk: Clerk, store: FakeAccessStore) -> list[AuditEvent]:
    clerk.write()
    return store.events


@pytest.fixture
def store() -> FakeAccessStore:
    return FakeAccessStore()


@pytest.fixture
def clerk(store: FakeAccessStore) -> Clerk:
    return Clerk(store)


def test_one_refusal_is_one_row_as_it_was(clerk: Clerk, store: FakeAccessStore) -> None:
    whole = event("node-1", source=SOMEWHERE, request_id="r-1", reason="unknown")
    clerk.note(whole)
    assert rows(clerk, store) == [whole]
    assert rows(clerk, store) == [whole]


def test_a_hundred_equal_refusals_are_counted_into_one_row(clerk: Clerk, store: FakeAccessStore) -> None:
    for number in range(100):
        clerk.note(event("node-1", at=NOON + timedelta(milliseconds=number), request_id=f"r-{number}"))
    # At the time of the first; whose request it was would be true of one alone.
    assert rows(clerk, store) == [event("node-1", count=100)]


@pytest.mark.parametrize("field", ["actor", "source", "reason", "action", "outcome"])
def test_what_differs_is_told_apart(clerk: Clerk, store: FakeAccessStore, field: str) -> None:
    other: dict[str, Any] = {"action": AuditAction.PROVISION, "outcome": AuditOutcome.NOTED}
    clerk.note(event())
    clerk.note(event(**{field: other.get(field, "other")}))
    clerk.note(event())
    assert [row.count for row in rows(clerk, store)] == [2, 1]


def test_records_that_are_away_lose_nothing_and_make_no_more_rows_of_it(
    clerk: Clerk, store: FakeAccessStore
) -> None:
    store.away = True
    for turn in range(20):
        for number in range(300):
            clerk.note(event(f"node-{turn}-{number}", source=SOMEWHERE))
        clerk.note_used("key", NOON + timedelta(seconds=turn))
        clerk.write()
    assert store.events == []
    store.away = False
    written = rows(clerk, store)
    assert sum(row.count for row in written) == 20 * 300
    assert len(written) <= 100 + 2
    assert store.used == {"key": NOON + timedelta(seconds=19)}


def test_a_use_during_a_failed_write_is_not_taken_back_by_it(store: FakeAccessStore) -> None:
    clerk = Clerk(store)

    class Interrupted(FakeAccessStore):
        def write(self, *_: Any) -> None:
            clerk.note_used("key", NOON + timedelta(seconds=1))
            raise errors.RecordsUnavailableError("away")

    clerk.note_used("key", NOON)
    clerk._store = Interrupted()
    clerk.write()
    clerk._store = store
    clerk.write()
    assert store.used == {"key": NOON + timedelta(seconds=1)}


def test_who_asks_for_the_log_sees_what_was_being_written_meanwhile() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FakeAccessStore):
        def write(self, events: Any, used: Any) -> None:
            begun.set()
            go_on.wait(10)
            super().write(events, used)

    store = Slow()
    clerk = Clerk(store)
    clerk.note(event("node-1"))
    writer = threading.Thread(target=clerk.write)
    writer.start()
    assert begun.wait(10)
    seen: list[AuditEvent] = []

    def read() -> None:
        clerk.write()
        seen.extend(store.events)

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(0.2)
    go_on.set()
    writer.join(10)
    reader.join(10)
    assert seen == [event("node-1")]


@pytest.fixture
def busy_clerk(store: FakeAccessStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clerk]:
    monkeypatch.setattr(clerk_module, "INTERVAL_SECONDS", 0.01)
    clerk = Clerk(store)
    yield clerk
    clerk.close()


def test_it_writes_by_itself_and_goes_on_after_whatever_happened(
    busy_clerk: Clerk, store: FakeAccessStore, caplog: pytest.LogCaptureFixture
) -> None:
    turns: list[int] = []

    def stumble() -> None:
        turns.append(len(turns))
        if len(turns) == 1:
            raise RuntimeError("stumbled")
        if len(turns) == 2:
            raise errors.RecordsUnavailableError("away")

    busy_clerk.start(stumble)
    busy_clerk.note(event("node-1"))
    eventually(lambda: store.events == [event("node-1")])
    eventually(lambda: len(turns) > 3)
    assert [record.message for record in caplog.records] == ["clerk_failed"]


def test_what_is_left_at_the_end_is_written(busy_clerk: Clerk, store: FakeAccessStore) -> None:
    store.away = True
    busy_clerk.start(lambda: None)
    busy_clerk.note(event("node-1"))
    busy_clerk.note_used("key", NOON)
    store.away = False
    busy_clerk.close()
    assert store.events == [event("node-1")]
    assert store.used == {"key": NOON}


def test_a_clerk_that_never_began_writes_what_it_was_told(clerk: Clerk, store: FakeAccessStore) -> None:
    clerk.notice(AuditAction.CONFIG_EDITED, "our own blocks")
    clerk.close()
    (row,) = store.events
    assert (row.actor, row.outcome, row.reason) == ("service", AuditOutcome.NOTED, "our own blocks")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.UnauthenticatedError("used_up", "0" * 16), "used_up"),
        (errors.AuthenticationOffError("admin"), "authentication_off"),
        (errors.ForbiddenError("admin"), "forbidden"),
        (errors.RateLimitedError(7), "rate"),
        (errors.NonceError(), "nonce"),
        (errors.DuplicatePeerError("node-1", {"assigned_ip": "10.0.0.2"}), "duplicate"),
        (errors.ConfigFileError("/etc/wireguard/wg0.conf", "no key", "mend it"), "hub"),
        (errors.OvertakenError(), "records"),
        (errors.InvalidCredentialsError("public_key", "what was sent"), "invalid"),
        (errors.ProvisioningError("anything"), "failed"),
        (RequestValidationError([]), "invalid"),
        (HTTPException(413, "what was sent"), "status_413"),
        (ValueError("what was sent"), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_refusal_is_logged_as_one_word_of_our_own(error: Exception, reason: str) -> None:
    assert _reason(error) == reason
