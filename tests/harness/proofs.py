"""Requests to provision with their proofs, each part of which a test can make false."""

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend.client.node import CHALLENGE_PATH, PROVISION_PATH, Node
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    Challenge,
    SignedRequest,
    WireGuardProof,
    answer_challenge,
    sign,
)
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.credentials import audit_entries, uses
from tests.harness.requests import bearer, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import assert_in_step, listed
from tests.harness.wireguard import HubInterface

PROOF_HEADERS: Final = (
    TIMESTAMP_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    CHALLENGE_HEADER,
    WIREGUARD_PROOF_HEADER,
)


def new_node(node_id: str = "") -> Node:
    """Make a node with keys of its own."""
    name = node_id or f"node-{secrets.token_hex(4)}"
    return Node(name, Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())


@contextmanager
def nothing_changed(service: ServiceProcess, hub: HubInterface) -> Iterator[None]:
    """Check that records, file, interface and tokens are as they were."""

    def state() -> tuple[object, ...]:
        return listed(service), hub.config_path.read_bytes(), hub.peers(), uses(service)

    before = state()
    yield
    assert state() == before
    assert_in_step(service, hub)


def newest(service: ServiceProcess, node_id: str) -> tuple[str, str, str, str]:
    """Return what the audit log has of the newest act on a node."""
    entry = audit_entries(service, subject=node_id)[0]
    return entry["action"], entry["outcome"], entry["reason"], entry["actor"]


@dataclass
class Attempt:
    """A request of a node, of which each part can be made false before it is signed or sent."""

    service: ServiceProcess
    node: Node
    token: str
    over: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        fields = provision_body(self.node.node_id, self.node.wireguard_public_key)
        self.body = json.dumps({**fields, "public_key": self.node.identity.peer_id, **self.over}).encode()
        self.proof = self.sign()

    def challenge(self, key: str | None = None) -> Challenge:
        """Ask for a challenge, for the key in the body."""
        wanted = key or json.loads(self.body)["wireguard_public_key"]
        answer = self.service.client.post(
            CHALLENGE_PATH, json={"wireguard_public_key": wanted}, headers=bearer(self.token)
        ).raise_for_status()
        fields = answer.json()
        return Challenge(fields["challenge_id"], fields["server_public_key"], fields["challenge"])

    def sign(self, **lies: Any) -> dict[str, str]:
        """Sign it, but for the lies; return all five headers of the proof."""
        digest = hashlib.sha256(self.body).digest()
        question = self.service.client.post(
            CHALLENGE_PATH,
            json={"wireguard_public_key": self.node.wireguard_public_key},
            headers=bearer(self.token),
        )
        timestamp = lies.pop("timestamp", int(time.time()))
        truth = SignedRequest("POST", PROVISION_PATH, question.json()["audience"], digest)
        identity = sign(self.node.identity_private_key, replace(truth, **lies), timestamp)
        return identity.headers() | self.answer()

    def answer(self) -> dict[str, str]:
        """Answer a new challenge for the body; return both headers."""
        challenge = self.challenge()
        digest = hashlib.sha256(self.body).digest()
        mac = answer_challenge(self.node.wireguard_private_key, challenge, digest)
        return WireGuardProof(challenge.challenge_id, mac).headers()

    def send(self, *more: tuple[str, str]) -> httpx.Response:
        """Send it with its proof, and with more headers."""
        headers = [
            ("Content-Type", "application/json"),
            *bearer(self.token).items(),
            *self.proof.items(),
            *more,
        ]
        return self.service.client.post(PROVISION_PATH, content=self.body, headers=headers)
