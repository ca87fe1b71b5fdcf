"""Making, listing and revoking credentials."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from backend import errors
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import CredentialKind, KeyRequest, Role, TokenRequest
from tests.harness.access import Access, CommandLine
from tests.harness.fakes import FakeAccessStore


@pytest.fixture
def store() -> FakeAccessStore:
    return FakeAccessStore()


@pytest.fixture
def access(store: FakeAccessStore) -> Access:
    return Access(store)


def test_each_credential_is_logged_when_it_is_made_and_revoked(
    access: Access, store: FakeAccessStore
) -> None:
    admin, secret = access.credentials.make(KeyRequest(role=Role.ADMIN), access.authenticate(access.local))
    caller = access.authenticate(secret)
    token, _ = access.credentials.make(TokenRequest(), caller)
    access.credentials.revoke(CredentialKind.TOKEN, token.id, caller)
    assert [(logged.action, logged.actor, logged.subject) for logged in store.events] == [
        (AuditAction.KEY_MADE, "local", admin.id),
        (AuditAction.TOKEN_MADE, caller.name, token.id),
        (AuditAction.TOKEN_REVOKED, caller.name, token.id),
    ]
    assert {logged.outcome for logged in store.events} == {AuditOutcome.ACCEPTED}
    assert {logged.request_id for logged in store.events} == {"r-1"}
    assert [found.id for found in access.credentials.of_kind(CredentialKind.KEY)] == [admin.id]
    assert secret.reveal().rpartition("_")[2] not in repr(store.events)


def test_unknown_credential_and_one_of_another_kind_are_not_found(access: Access) -> None:
    token, _ = access.credentials.make(TokenRequest(), SERVICE)
    for kind, name in ((CredentialKind.KEY, token.id), (CredentialKind.TOKEN, "0" * 16)):
        with pytest.raises(errors.CredentialNotFoundError, match=f"{kind.value} {name} not found"):
            access.credentials.revoke(kind, name, SERVICE)


def test_credential_that_was_made_here_is_authenticated_and_one_that_was_revoked_is_not(
    access: Access, store: FakeAccessStore
) -> None:
    key, secret = access.credentials.make(KeyRequest(role=Role.READ), SERVICE)
    assert access.authenticate(secret).name == f"key:{key.id}"
    access.credentials.revoke(CredentialKind.KEY, key.id, SERVICE)
    store.away = True
    assert access.refused(secret) == ("revoked", key.id)


def test_credential_that_the_command_line_just_made_can_be_revoked(
    access: Access, store: FakeAccessStore
) -> None:
    access.cache.refresh()
    secret = CommandLine(store).make(KeyRequest(role=Role.READ))
    assert access.credentials.revoke(CredentialKind.KEY, secret.id, SERVICE).revoked_at is not None


def test_local_admin_is_neither_listed_nor_revoked(access: Access) -> None:
    caller = access.authenticate(access.local)
    assert access.credentials.of_kind(CredentialKind.KEY) == []
    with pytest.raises(errors.CredentialNotFoundError):
        access.credentials.revoke(CredentialKind.KEY, access.local.id, caller)
    assert access.authenticate(access.local).name == "local"


def test_list_shows_the_last_use_that_the_records_have(access: Access, store: FakeAccessStore) -> None:
    key, _ = access.credentials.make(KeyRequest(role=Role.READ), SERVICE)
    at = datetime.now(UTC)
    store.credentials[key.id] = replace(key, last_used_at=at)
    (listed,) = access.credentials.of_kind(CredentialKind.KEY)
    assert listed.last_used_at == at


def test_records_that_are_away_make_no_credential(access: Access, store: FakeAccessStore) -> None:
    store.away = True
    with pytest.raises(errors.RecordsUnavailableError):
        access.credentials.make(TokenRequest(), SERVICE)
