"""Which proofs a hub accepts, how often, and what it looks at first."""

import hashlib
import secrets
import threading
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
    Challenge,
    SignedRequest,
    WireGuardProof,
    answer_challenge,
    sign,
)
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.access import challenges as challenges_module
from backend.services.access.challenges import Proof, ProofVerifier, WireGuardChallenges

BODY = hashlib.sha256(b'{"node_id":"a"}').digest()
HUB = "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="


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
        self.request = SignedRequest(
            "POST",
            "/api/v1/wireguard/provision",
            WireGuardPrivateKey.generate().public_key(),
            secrets.token_bytes(32),
        )

    def proof(self) -> Proof:
        signed = sign(self.owner, self.request, int(datetime.now(UTC).timestamp()))
        return Proof(signed, self.answer(), self.request)

    def answer(self) -> WireGuardProof:
        """Answer a new challenge for the request."""
        challenge = self.verifier.challenges.issue(self.private.public_key())
        mac = answer_challenge(self.private, challenge, self.request.body_sha256)
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


def test_one_of_several_copies_sent_at_once_is_accepted(node: Node) -> None:
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
    clock.now += 2
    node.send(replace(proof, wireguard=node.answer()))


def test_oldest_nonce_makes_room(node: Node) -> None:
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
    forged = replace(proof, request=replace(proof.request, **changed))
    # The answer to a challenge is for one body, too.
    expected = errors.ChallengeError if field == "body_sha256" else errors.SignatureError
    with pytest.raises(expected):
        node.send(forged)
    node.send(replace(proof, wireguard=node.answer()))


def test_a_node_without_the_wireguard_keys_private_half_is_refused(node: Node) -> None:
    proof = node.proof()
    with pytest.raises(errors.ChallengeError):
        node.send(replace(proof, wireguard=replace(proof.wireguard, mac=bytes(32))))


def test_cheap_checks_come_before_costly_ones(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a flood of proofs that are wrong costs a signature or a power each."""
    looked: list[str] = []
    for name in ("check_clock", "check_signature"):
        monkeypatch.setattr(challenges_module, name, _noted(looked, name, getattr(challenges_module, name)))
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


# Challenges to a WireGuard key


@pytest.fixture
def private() -> WireGuardPrivateKey:
    return WireGuardPrivateKey.generate()


@pytest.fixture
def challenges(clock: Clock) -> WireGuardChallenges:
    return WireGuardChallenges(clock)


def answered(private: WireGuardPrivateKey, challenge: Challenge, body: bytes = BODY) -> tuple[str, bytes]:
    return challenge.challenge_id, answer_challenge(private, challenge, body)


def test_a_challenge_is_good_for_one_try(
    private: WireGuardPrivateKey, challenges: WireGuardChallenges
) -> None:
    key = private.public_key()
    challenge_id, mac = answered(private, challenges.issue(key))
    challenges.redeem(challenge_id, key, mac, BODY)
    with pytest.raises(errors.ChallengeError):
        challenges.redeem(challenge_id, key, mac, BODY)

    challenge_id, mac = answered(private, challenges.issue(key))
    with pytest.raises(errors.ChallengeError):
        challenges.redeem(challenge_id, key, bytes(32), BODY)
    with pytest.raises(errors.ChallengeError):
        challenges.redeem(challenge_id, key, mac, BODY)


@pytest.mark.parametrize(
    ("part", "spoilt"),
    [
        (0, "0" * 32),
        (0, "\ud800"),
        (1, HUB),
        (2, b""),
        (2, bytes(31)),
        (2, bytes(32)),
        (3, hashlib.sha256(b"other").digest()),
    ],
)
def test_answer_is_valid_for_one_challenge_one_key_and_one_body(
    private: WireGuardPrivateKey, challenges: WireGuardChallenges, part: int, spoilt: Any
) -> None:
    challenge_id, mac = answered(private, challenges.issue(private.public_key()))
    proof: list[Any] = [challenge_id, private.public_key(), mac, BODY]
    proof[part] = spoilt
    with pytest.raises(errors.ChallengeError):
        challenges.redeem(*proof)


def test_node_without_the_private_key_has_no_answer(challenges: WireGuardChallenges) -> None:
    """It has the challenge and the public key, and can only put a private key of its own in."""
    victim, thief = WireGuardPrivateKey.generate().public_key(), WireGuardPrivateKey.generate()
    challenge_id, mac = answered(thief, challenges.issue(victim))
    with pytest.raises(errors.ChallengeError):
        challenges.redeem(challenge_id, victim, mac, BODY)
    challenge_id, mac = answered(thief, challenges.issue(victim))
    with pytest.raises(errors.ChallengeError):
        challenges.redeem(challenge_id, thief.public_key(), mac, BODY)


@pytest.mark.parametrize(("after", "passes"), [(60, True), (60.01, False)])
def test_challenge_expires_after_a_minute(
    private: WireGuardPrivateKey, challenges: WireGuardChallenges, clock: Clock, after: float, passes: bool
) -> None:
    challenge_id, mac = answered(private, challenges.issue(private.public_key()))
    clock.now += after
    if passes:
        challenges.redeem(challenge_id, private.public_key(), mac, BODY)
    else:
        with pytest.raises(errors.ChallengeError):
            challenges.redeem(challenge_id, private.public_key(), mac, BODY)
        assert len(challenges) == 0


def test_expired_challenges_are_forgotten_when_the_next_is_made(
    private: WireGuardPrivateKey, challenges: WireGuardChallenges, clock: Clock
) -> None:
    for _ in range(5):
        challenges.issue(private.public_key())
    clock.now += 30
    challenges.issue(private.public_key())
    assert len(challenges) == 6
    clock.now += 31
    challenges.issue(private.public_key())
    assert len(challenges) == 2


def test_oldest_challenge_makes_room_and_no_node_is_refused(clock: Clock) -> None:
    challenges = WireGuardChallenges(clock, limit=3)
    nodes = [WireGuardPrivateKey.generate() for _ in range(4)]
    given_ = [challenges.issue(node.public_key()) for node in nodes]
    assert len(challenges) == 3
    outcomes = []
    for node, challenge in zip(nodes, given_, strict=True):
        challenge_id, mac = answered(node, challenge)
        try:
            challenges.redeem(challenge_id, node.public_key(), mac, BODY)
        except errors.ChallengeError:
            outcomes.append(False)
        else:
            outcomes.append(True)
    assert outcomes == [False, True, True, True]


def test_another_challenge_for_a_key_leaves_the_first_alone(
    private: WireGuardPrivateKey, challenges: WireGuardChallenges
) -> None:
    """Anybody may know a public key: whoever asks for a challenge for it must not lock its holder out."""
    first = challenges.issue(private.public_key())
    for _ in range(100):
        challenges.issue(private.public_key())
    challenge_id, mac = answered(private, first)
    challenges.redeem(challenge_id, private.public_key(), mac, BODY)


def test_same_answer_from_many_threads_is_accepted_once(
    private: WireGuardPrivateKey, challenges: WireGuardChallenges
) -> None:
    key = private.public_key()
    for _ in range(20):
        challenge_id, mac = answered(private, challenges.issue(key))
        together = threading.Barrier(8)
        let_in: list[int] = []

        def redeem(
            number: int, *, proof: tuple[str, bytes], start: threading.Barrier, into: list[int]
        ) -> None:
            start.wait()
            try:
                challenges.redeem(proof[0], key, proof[1], BODY)
            except errors.ChallengeError:
                return
            into.append(number)

        threads = [
            threading.Thread(
                target=redeem,
                args=(number,),
                kwargs={"proof": (challenge_id, mac), "start": together, "into": let_in},
            )
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(let_in) == 1
