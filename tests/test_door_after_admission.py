"""What the door checks once a request has been let in: whether that still holds."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from backend import errors
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import SERVICE, Caller
from backend.models.access.credentials import (
    Credential,
    CredentialKind,
    KeyRequest,
    Permission,
    Role,
    TokenRequest,
)
from backend.services.access.audit_writer import Clerk
from backend.services.access.authenticator import Door
from tests.harness.fakes import FakeAccessStore, NoLimits

SOMEWHERE = "192.0.2.1"


def event() -> AuditEvent:
    return SERVICE.event(datetime.now(UTC), AuditAction.KEY_MADE, AuditOutcome.ACCEPTED, "key")


class Hub:
    """A door, the store behind it, and the command line that writes there too."""

    def __init__(self) -> None:
        self.store = FakeAccessStore()
        self.door = Door(self.store, Clerk(self.store), NoLimits())

    def make(self, request: TokenRequest | KeyRequest) -> Credential:
        credential, _ = request.make("cli:root", datetime.now(UTC))
        self.store.keep_credential(credential, event())
        self.door.refresh()
        return credential


@pytest.fixture
def hub() -> Hub:
    return Hub()


# A body may take long to come in


def test_a_credential_that_was_revoked_since_admission_is_refused(hub: Hub) -> None:
    credential = hub.make(KeyRequest(role=Role.ADMIN))
    caller = Caller.of(credential, SOMEWHERE, "r-1")
    hub.door.require(caller, Permission.READ)
    hub.store.revoke_credential(credential.id, event())
    hub.door.refresh()
    with pytest.raises(errors.UnauthenticatedError) as refused:
        hub.door.require(caller, Permission.READ)
    assert (refused.value.reason, refused.value.credential_id) == ("revoked", credential.id)


def test_a_credential_that_the_door_does_not_know_yet_holds_as_it_was_shown(hub: Hub) -> None:
    # Looked up by the request itself, a moment before the door's memory has it.
    credential, _ = KeyRequest(role=Role.READ).make("cli:root", datetime.now(UTC))
    hub.door.require(Caller.of(credential, SOMEWHERE, "r-1"), Permission.READ)
    expired = replace(credential, expires_at=credential.created_at)
    with pytest.raises(errors.UnauthenticatedError) as refused:
        hub.door.require(Caller.of(expired, SOMEWHERE, "r-1"), Permission.READ)
    assert refused.value.reason == "expired"


def test_a_started_door_knows_the_recorded_credentials_and_a_closed_one_has_written_its_log(
    hub: Hub,
) -> None:
    credential, _ = KeyRequest(role=Role.ADMIN).make("cli:root", datetime.now(UTC))
    hub.store.keep_credential(credential, event())
    before = len(hub.store.events)
    hub.door.start()
    assert [known.id for known in hub.door.listed(CredentialKind.KEY)] == [credential.id]
    hub.door.clerk.notice(AuditAction.CONFIG_EDITED, None)
    hub.door.close()
    assert len(hub.store.events) == before + 1


def test_a_started_door_follows_the_command_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[object] = []
    monkeypatch.setattr(hub.door.clerk, "start", followed.append)
    hub.door.start()
    (every_turn,) = followed
    credential = hub.make(KeyRequest(role=Role.ADMIN))
    hub.store.revoke_credential(credential.id, event())
    caller = Caller.of(credential, SOMEWHERE, "r-1")
    hub.door.require(caller, Permission.READ)
    assert callable(every_turn)
    every_turn()
    with pytest.raises(errors.UnauthenticatedError):
        hub.door.require(caller, Permission.READ)
