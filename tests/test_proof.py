"""A signature is for one request to one hub at one time; a challenge is answered by one key for one body."""

import base64
import hashlib
import pickle
from dataclasses import replace
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import (
    ChallengeError,
    ClockError,
    NonceError,
    ProofError,
    ProofMissingError,
    ProvisioningError,
    SignatureError,
)
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_SECONDS,
    WINDOW_SECONDS,
    Challenge,
    IdentityProof,
    SignedRequest,
    WireGuardProof,
    answer_challenge,
    check_clock,
    check_signature,
    make_challenge,
    sign,
)
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey

NOW: Final = 1_800_000_000
BODY: Final = hashlib.sha256(b'{"node_id":"a"}').digest()
HUB: Final = "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="
REQUEST: Final = SignedRequest("POST", "/api/v1/wireguard/provision", HUB, BODY)
SIGNATURE: Final = base64.b64encode(bytes(range(192, 256))).decode()


class Clock:
    """Shows what it is set to."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def owner() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def identity_of(owner: Ed25519PrivateKey) -> NodeIdentity:
    return NodeIdentity(owner.public_key().public_bytes_raw())


def check_now(identity: NodeIdentity, proof: IdentityProof, request: SignedRequest, clock: Clock) -> None:
    check_clock(proof, clock)
    check_signature(identity, proof, request)


def signed_message(*, timestamp: int, nonce: str, **request: Any) -> bytes:
    return SignedRequest(**request).message(timestamp, nonce)


requests = st.fixed_dictionaries(
    {
        "method": st.text(max_size=4),
        "path": st.text(max_size=4),
        "audience": st.text(max_size=4),
        "body_sha256": st.binary(max_size=4),
        "timestamp": st.integers(0, 10**15 - 1),
        "nonce": st.text("a0-_1", max_size=4),
    }
)


@given(requests, requests)
def test_no_two_requests_are_signed_as_the_same_bytes(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (signed_message(**one) == signed_message(**other)) == (one == other)


@given(requests, st.sampled_from(["method", "path", "audience"]), st.text(min_size=1, max_size=3))
def test_signature_covers_field_boundaries(request_: dict[str, Any], field: str, moved: str) -> None:
    after = {"method": "path", "path": "audience", "audience": "nonce"}[field]
    here = {**request_, field: request_[field] + moved}
    there = {**request_, after: moved + request_[after]}
    assert signed_message(**here) != signed_message(**there)


def test_what_is_signed_is_what_the_documentation_says() -> None:
    fields = [
        b"wireguard-provisioning/identity/1",
        b"POST",
        b"/api/v1/wireguard/provision",
        HUB.encode(),
        BODY,
        b"1800000000",
        b"n" * 16,
    ]
    expected = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    assert REQUEST.message(NOW, "n" * 16) == expected


def test_a_signed_request_is_its_owners(owner: Ed25519PrivateKey, clock: Clock) -> None:
    proof = sign(owner, REQUEST, NOW)
    check_now(identity_of(owner), proof, REQUEST, clock)
    headers = proof.headers()
    assert IdentityProof.parse(*headers.values()) == proof
    assert list(headers) == ["X-Node-Timestamp", "X-Node-Nonce", "X-Node-Signature"]
    with pytest.raises(SignatureError):
        check_now(identity_of(Ed25519PrivateKey.generate()), proof, REQUEST, clock)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "DELETE"},
        {"path": "/api/v1/wireguard/provision/"},
        {"audience": "mGqzHhYUtLHdQwJXu1lU5FLJ3yTyD5RcFr8ZGVPp0Gc="},
        {"body_sha256": hashlib.sha256(b'{"node_id":"b"}').digest()},
    ],
)
def test_a_signature_is_good_for_no_other_request(
    owner: Ed25519PrivateKey, clock: Clock, change: dict[str, Any]
) -> None:
    proof = sign(owner, REQUEST, NOW)
    with pytest.raises(SignatureError):
        check_now(identity_of(owner), proof, replace(REQUEST, **change), clock)


@pytest.mark.parametrize("change", [{"timestamp": NOW + 1}, {"nonce": "another-nonce-of-mine"}])
def test_time_and_nonce_are_signed_too(
    owner: Ed25519PrivateKey, clock: Clock, change: dict[str, Any]
) -> None:
    proof = replace(sign(owner, REQUEST, NOW), **change)
    with pytest.raises(SignatureError):
        check_now(identity_of(owner), proof, REQUEST, clock)


@pytest.mark.parametrize(
    ("off", "passes"),
    [(0, True), (60, True), (-60, True), (60.01, False), (-60.01, False), (1e9, False), (-NOW, False)],
)
def test_the_clock_may_be_a_minute_off_either_way(
    owner: Ed25519PrivateKey, clock: Clock, off: float, passes: bool
) -> None:
    proof = sign(owner, REQUEST, NOW)
    clock.now = NOW + off
    if passes:
        check_now(identity_of(owner), proof, REQUEST, clock)
        assert clock.now <= proof.valid_until
    else:
        with pytest.raises(ClockError):
            check_now(identity_of(owner), proof, REQUEST, clock)


def test_a_nonce_is_needed_until_the_clock_refuses_the_request_anyway(
    owner: Ed25519PrivateKey, clock: Clock
) -> None:
    # Signed by a clock that is as fast as it may be: good for two minutes.
    proof = sign(owner, REQUEST, NOW + WINDOW_SECONDS)
    check_now(identity_of(owner), proof, REQUEST, clock)
    clock.now = proof.valid_until
    check_now(identity_of(owner), proof, REQUEST, clock)
    clock.now = proof.valid_until + 0.01
    with pytest.raises(ClockError):
        check_now(identity_of(owner), proof, REQUEST, clock)


def test_every_signature_has_a_nonce_of_its_own(owner: Ed25519PrivateKey) -> None:
    assert len({sign(owner, REQUEST, NOW).nonce for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ((None, "n" * 16, SIGNATURE), ProofMissingError),
        (("1", None, SIGNATURE), ProofMissingError),
        (("1", "n" * 16, None), ProofMissingError),
        *[
            ((text, "n" * 16, SIGNATURE), ClockError)
            for text in ("", "-1", "+1", "01", "1.0", "1e3", " 1", "1\n", "1" * 16, "\u0661", "now")
        ],
        *[
            (("1", text, SIGNATURE), NonceError)
            for text in (
                "",
                "n" * 15,
                "n" * 65,
                "n" * 15 + " ",
                "n" * 16 + "\n",
                "n" * 15 + "\xe9",
                "n" * 15 + "+",
            )
        ],
        *[
            (("1", "n" * 16, text), SignatureError)
            for text in (
                "",
                SIGNATURE[:-1],
                SIGNATURE[:-2],
                SIGNATURE + "\n",
                SIGNATURE[:-3] + "x==",
                SIGNATURE.replace("/", "_"),
                "\xe9" * 88,
                base64.b64encode(bytes(63)).decode(),
                base64.b64encode(bytes(65)).decode(),
                bytes(64).hex(),
            )
        ],
    ],
)
def test_headers_in_another_spelling_are_refused(
    headers: tuple[str | None, str | None, str | None], error: type[ProofError]
) -> None:
    with pytest.raises(error):
        IdentityProof.parse(*headers)


@pytest.mark.parametrize("text", ["0", "1", str(NOW), "9" * 15])
def test_a_timestamp_is_unix_seconds(text: str) -> None:
    assert IdentityProof.parse(text, "n" * 64, SIGNATURE).timestamp == int(text)


@pytest.mark.parametrize(
    ("error", "reason", "says"),
    [
        (ProofMissingError("X-Node-Nonce"), "missing", "X-Node-Nonce is missing"),
        (ClockError(), "clock", "within 60 s"),
        (SignatureError(), "signature", "public_key"),
        (NonceError(), "nonce", "must be new"),
        (ChallengeError(), "challenge", "ask for another"),
    ],
)
def test_each_refusal_has_a_word_for_the_log_and_a_sentence_for_the_caller(
    error: ProofError, reason: str, says: str
) -> None:
    assert isinstance(error, ProvisioningError)
    assert error.audit_reason == reason
    assert says in str(error)
    assert "\n" not in str(error)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    assert (type(again), str(again)) == (type(error), str(error))


# The WireGuard key.


@pytest.fixture
def private() -> WireGuardPrivateKey:
    return WireGuardPrivateKey.generate()


def test_the_answer_is_what_the_documentation_says(private: WireGuardPrivateKey) -> None:
    def framed(*fields: bytes) -> bytes:
        return b"".join(len(field).to_bytes(4, "big") + field for field in fields)

    challenge, expected = make_challenge(private.public_key())
    assert challenge.expires_in == CHALLENGE_SECONDS
    domain, challenge_id = b"wireguard-provisioning/wireguard-key/1", challenge.challenge_id.encode()
    server = base64.b64decode(challenge.server_public_key)
    own = X25519PrivateKey.from_private_bytes(base64.b64decode(private.reveal()))
    shared = own.exchange(X25519PublicKey.from_public_bytes(server))
    info = framed(domain, server, own.public_key().public_bytes_raw(), challenge_id)
    mac = hmac.HMAC(HKDF(hashes.SHA256(), 32, None, info).derive(shared), hashes.SHA256())
    mac.update(framed(domain, challenge_id, base64.b64decode(challenge.challenge), BODY))
    answer = mac.finalize()
    assert expected.is_given(challenge.challenge_id, private.public_key(), answer, BODY)
    assert answer_challenge(private, challenge, BODY) == answer
    proof = WireGuardProof(challenge.challenge_id, answer)
    assert WireGuardProof.parse(*proof.headers().values()) == proof


@pytest.mark.parametrize("u", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
def test_a_key_agreement_that_everybody_knows_is_refused_on_both_sides(
    private: WireGuardPrivateKey, u: int
) -> None:
    nobodys = base64.b64encode(u.to_bytes(32, "little")).decode()
    with pytest.raises(ChallengeError):
        # The parser would refuse it; even so.
        make_challenge(WireGuardKey(nobodys))
    with pytest.raises(ChallengeError):
        answer_challenge(private, Challenge("id", nobodys, HUB), BODY)


@pytest.mark.parametrize("challenge", [Challenge("id", "no key", HUB), Challenge("id", HUB, "no base64")])
def test_malformed_challenge_is_not_answered(private: WireGuardPrivateKey, challenge: Challenge) -> None:
    with pytest.raises(ChallengeError):
        answer_challenge(private, challenge, BODY)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ((None, HUB), ProofMissingError),
        (("id", None), ProofMissingError),
        (("id", ""), ChallengeError),
        (("id", HUB[:-1]), ChallengeError),
        (("id", HUB[:-2] + "9="), ChallengeError),
        (("id", base64.b64encode(bytes(31)).decode()), ChallengeError),
    ],
)
def test_headers_of_an_answer_in_another_spelling_are_refused(
    headers: tuple[str | None, str | None], error: type[ProofError]
) -> None:
    with pytest.raises(error):
        WireGuardProof.parse(*headers)


def test_nothing_shows_the_key_that_answers_are_checked_with(private: WireGuardPrivateKey) -> None:
    challenge, expected = make_challenge(private.public_key())
    assert repr(expected.mac_key) not in repr(expected)
    assert private.reveal() not in repr(expected) + repr(challenge)
