"""Which proofs a hub accepts, how often, and what it looks at first."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend import errors
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    WINDOW_SECONDS,
    WireGuardChallenges,
    WireGuardProof,
    answer_challenge,
    sign,
)
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.access import challenges as proving
from backend.services.access.challenges import Proof, ProofVerifier


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Node:
    """A node with both keys, and the one request that it signs."""

    def __init__(self, verifier: ProofVerifier) -> None:
        self.verifier = verifier
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
        signed = sign(self.owner, timestamp=int(datetime.now(UTC).timestamp()), **self.request)
        return Proof(signed, self.answer(), **self.request)

    def answer(self) -> WireGuardProof:
        """Answer a new challenge for the request."""
        challenge = self.verifier.challenges.issue(self.private.public_key())
        mac = answer_challenge(self.private, challenge, self.request["body_sha256"])
        return WireGuardProof(challenge.challenge_id, mac)

    def send(self, proof: Proof, public_key: str | None = None) -> tuple[NodeIdentity, str]:
        """Have it verified; return whose it is, and the nonce."""
        spelling = public_key or self.identity.peer_id
        identity, nonce = self.verifier.verify(proof, spelling, self.private.public_key())
        assert nonce.identity == identity.peer_id
        return identity, nonce.nonce


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> Node:
    return Node(ProofVerifier(WireGuardChallenges(), clock, limit=3))


def test_a_request_that_proves_both_keys_is_accepted_once(node: Node) -> None:
    proof = node.proof()
    assert node.send(proof) == (node.identity, proof.identity.nonce)
    with pytest.raises(errors.ChallengeError):
        node.send(proof)
    node.send(node.proof())


def test_a_signature_is_accepted_once_whatever_challenge_it_comes_with(node: Node) -> None:
    """The challenge says that the WireGuard key is there, and nothing of whose the request is."""
    proof = node.proof()
    node.send(proof)
    with pytest.raises(errors.NonceError):
        node.send(replace(proof, wireguard=node.answer()))


def test_of_copies_that_are_sent_at_once_one_is_accepted(node: Node) -> None:
    proof = node.proof()
    copies = [proof] * 8 + [replace(proof, wireguard=node.answer()) for _ in range(8)]

    def accepted(copy: Proof) -> bool:
        try:
            node.send(copy)
        except errors.ProofError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(accepted, copies)) == 1


def test_a_nonce_is_remembered_for_as_long_as_its_signature_can_pass(node: Node, clock: Clock) -> None:
    proof = node.proof()
    node.send(proof)
    clock.now += 2 * WINDOW_SECONDS
    with pytest.raises(errors.NonceError):
        node.send(replace(proof, wireguard=node.answer()))
    clock.now += 1
    node.send(replace(proof, wireguard=node.answer()))


def test_more_nonces_than_there_is_room_for_push_out_the_oldest(node: Node) -> None:
    proofs = [node.proof() for _ in range(4)]
    for proof in proofs:
        node.send(proof)
    node.send(replace(proofs[0], wireguard=node.answer()))
    with pytest.raises(errors.NonceError):
        node.send(replace(proofs[3], wireguard=node.answer()))


@pytest.mark.parametrize("field", ["method", "path", "audience", "body_sha256"])
def test_a_signature_of_another_request_uses_up_no_nonce(node: Node, field: str) -> None:
    """Otherwise who has seen a node's nonce makes its request fail."""
    proof = node.proof()
    other: Any = {"method": "PUT", "path": "/", "audience": "another hub", "body_sha256": bytes(32)}[field]
    changed: dict[str, Any] = {field: other}
    forged = replace(proof, **changed)
    # The answer to a challenge is for one body, too.
    expected = errors.ChallengeError if field == "body_sha256" else errors.SignatureError
    with pytest.raises(expected):
        node.send(forged)
    node.send(replace(proof, wireguard=node.answer()))


def test_a_node_without_the_wireguard_keys_private_half_is_refused(node: Node) -> None:
    proof = node.proof()
    with pytest.raises(errors.ChallengeError):
        node.send(replace(proof, wireguard=replace(proof.wireguard, mac=bytes(32))))


def test_what_is_cheap_is_checked_before_what_costs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a flood of proofs that are wrong costs a signature or a power each."""
    looked: list[str] = []
    for name in ("check_clock", "check_signature"):
        monkeypatch.setattr(proving, name, _noted(looked, name, getattr(proving, name)))
    monkeypatch.setattr(
        node.verifier.challenges, "redeem", _noted(looked, "redeem", node.verifier.challenges.redeem)
    )
    proof = node.proof()
    late = replace(proof, identity=replace(proof.identity, timestamp=proof.identity.timestamp - 100))
    with pytest.raises(errors.ClockError):
        node.send(late)
    assert looked == ["check_clock"]
    with pytest.raises(errors.ChallengeError):
        node.send(replace(proof, wireguard=WireGuardProof("0" * 32, bytes(32))), "no identity")
    assert looked == ["check_clock", "check_clock", "redeem"]
    with pytest.raises(errors.InvalidCredentialsError):
        node.send(proof, "no identity")
    assert looked[3:] == ["check_clock", "redeem"]
    node.send(node.proof())
    assert looked[5:] == ["check_clock", "redeem", "check_signature"]


def _noted(looked: list[str], name: str, check: Any) -> Any:
    def noted(*arguments: Any, **named: Any) -> Any:
        looked.append(name)
        return check(*arguments, **named)

    return noted
