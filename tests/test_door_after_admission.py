"""What the door checks once a request has been let in: whether that still holds, and whose keys it has."""

import secrets
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
from backend.models.identity import NodeIdentity
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.clerk import Clerk
from backend.services.door import Door, Proof
from backend.services.proof import WireGuardChallenges, WireGuardProof, answer_challenge, sign
from tests.harness.fakes import FakeAccessStore, NoLimits

SOMEWHERE = "192.0.2.1"


def event() -> AuditEvent:
    return SERVICE.event(datetime.now(UTC), AuditAction.KEY_MADE, AuditOutcome.ACCEPTED, "key")


class Hub:
    """A door, the store behind it, and the command line that writes there too."""

    def __init__(self) -> None:
        self.store = FakeAccessStore()
        self.challenges = WireGuardChallenges()
        self.door = Door(self.store, Clerk(self.store), NoLimits(), self.challenges)

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


# Proof of both keys


class Node:
    """A node with both keys, and the one request that it signs."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.owner = Ed25519PrivateKey.generate()
        self.private = WireGuardPrivateKey.generate()
        self.identity = NodeIdentity(self.owner.public_key().public_bytes_raw())
        self.request: dict[str, Any] = {
            "method": "POST",
            "path": "/api/v1/wireguard/provision",
            "audience": WireGuardPrivateKey.generate().public_key(),
            "body_sha256": secrets.token_bytes(32),
        }

    def proof(self) -> Proof:
        challenge = self._hub.challenges.issue(self.private.public_key())
        mac = answer_challenge(self.private, challenge, self.request["body_sha256"])
        signed = sign(self.owner, timestamp=int(datetime.now(UTC).timestamp()), **self.request)
        return Proof(signed, WireGuardProof(challenge.challenge_id, mac), **self.request)

    def send(self, proof: Proof) -> None:
        self._hub.door.prove(proof, self.identity, self.private.public_key())


@pytest.fixture
def node(hub: Hub) -> Node:
    return Node(hub)


def test_a_request_that_proves_both_keys_is_accepted_once(hub: Hub, node: Node) -> None:
    proof = node.proof()
    node.send(proof)
    assert hub.store.nonces == {(node.identity.peer_id, proof.identity.nonce)}
    with pytest.raises(errors.NonceError):
        node.send(proof)
    node.send(node.proof())


@pytest.mark.parametrize("field", ["method", "path", "audience", "body_sha256"])
def test_a_signature_of_another_request_uses_up_neither_nonce_nor_challenge(
    hub: Hub, node: Node, field: str
) -> None:
    """Otherwise anybody could make a node's own request fail, and fill the table of nonces."""
    proof = node.proof()
    other: Any = {"method": "PUT", "path": "/", "audience": "another hub", "body_sha256": bytes(32)}[field]
    changed: dict[str, Any] = {field: other}
    forged = replace(proof, **changed)
    with pytest.raises(errors.SignatureError):
        node.send(forged)
    assert hub.store.nonces == set()
    assert len(hub.challenges) == 1
    node.send(proof)


def test_a_replay_uses_up_no_challenge(hub: Hub, node: Node) -> None:
    first = node.proof()
    node.send(first)
    second = node.proof()
    with pytest.raises(errors.NonceError):
        node.send(replace(second, identity=first.identity))
    node.send(second)


def test_a_node_without_the_wireguard_keys_private_half_is_refused(hub: Hub, node: Node) -> None:
    proof = node.proof()
    with pytest.raises(errors.ChallengeError):
        node.send(replace(proof, wireguard=replace(proof.wireguard, mac=bytes(32))))


def test_where_nothing_has_to_be_proved_nothing_can_be(hub: Hub, node: Node) -> None:
    proof = node.proof()
    trusting = Door(hub.store, Clerk(hub.store), NoLimits())
    with pytest.raises(RuntimeError, match="nothing has to be proved"):
        trusting.prove(proof, node.identity, node.private.public_key())
