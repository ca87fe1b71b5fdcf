"""Proof of a node's two keys: what is signed, what answers a challenge, and how both are checked.

The hub and the node share these functions, which keep no state. Of HTTP only the headers' names are here.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from backend.errors import (
    ChallengeError,
    ClockError,
    NonceError,
    ProofError,
    ProofMissingError,
    SignatureError,
)
from backend.models.access.encodings import decode_base64, encode_base64
from backend.models.access.identity import NodeIdentity
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey

TIMESTAMP_HEADER: Final = "X-Node-Timestamp"
NONCE_HEADER: Final = "X-Node-Nonce"
SIGNATURE_HEADER: Final = "X-Node-Signature"
CHALLENGE_HEADER: Final = "X-WireGuard-Challenge"
WIREGUARD_PROOF_HEADER: Final = "X-WireGuard-Proof"

# How far a signature's time may be from the hub's, either way.
WINDOW_SECONDS: Final = 60
CHALLENGE_SECONDS: Final = 60

_IDENTITY_DOMAIN: Final = b"wireguard-provisioning/identity/1"
_WIREGUARD_DOMAIN: Final = b"wireguard-provisioning/wireguard-key/1"
_TIMESTAMP: Final = re.compile(r"0|[1-9][0-9]{0,14}")
_NONCE: Final = re.compile(r"[A-Za-z0-9_-]{16,64}")
_SIGNATURE_BYTES: Final = 64
_MAC_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """What a node signs of a request.

    `audience` is the hub's public key in base64, so that what was signed for one hub is no good for another.
    """

    method: str
    path: str
    audience: str
    body_sha256: bytes

    def message(self, timestamp: int, nonce: str) -> bytes:
        """Return the bytes that are signed at a time (Unix seconds): no two requests have the same."""
        return _framed(
            _IDENTITY_DOMAIN,
            self.method.encode(),
            self.path.encode(),
            self.audience.encode(),
            self.body_sha256,
            str(timestamp).encode(),
            nonce.encode(),
        )


@dataclass(frozen=True, slots=True)
class IdentityProof:
    """A signature of a request, with the time (Unix seconds) and the nonce that it was made with."""

    timestamp: int
    nonce: str
    signature: bytes

    @classmethod
    def parse(cls, timestamp: str | None, nonce: str | None, signature: str | None) -> Self:
        """Read the three headers; raise ProofMissingError, ClockError, NonceError or SignatureError."""
        timestamp = _present(TIMESTAMP_HEADER, timestamp)
        nonce = _present(NONCE_HEADER, nonce)
        signature = _present(SIGNATURE_HEADER, signature)
        if _TIMESTAMP.fullmatch(timestamp) is None:
            raise ClockError
        if _NONCE.fullmatch(nonce) is None:
            raise NonceError
        return cls(int(timestamp), nonce, _decode(signature, _SIGNATURE_BYTES, SignatureError))

    @property
    def valid_until(self) -> int:
        """The last Unix second in which the clock lets it pass: keep the nonce until that is over."""
        return self.timestamp + WINDOW_SECONDS

    def headers(self) -> dict[str, str]:
        """Return what `parse` reads, by name."""
        return {
            TIMESTAMP_HEADER: str(self.timestamp),
            NONCE_HEADER: self.nonce,
            SIGNATURE_HEADER: encode_base64(self.signature),
        }


class Nonce(NamedTuple):
    """A nonce of an identity (its PeerID), which is recorded until its signature has expired."""

    identity: str
    nonce: str
    expires_at: datetime


def sign(private_key: Ed25519PrivateKey, request: SignedRequest, timestamp: int) -> IdentityProof:
    """Sign a request as the node, with a new nonce."""
    nonce = secrets.token_urlsafe(24)
    return IdentityProof(timestamp, nonce, private_key.sign(request.message(timestamp, nonce)))


def check_clock(proof: IdentityProof, clock: Callable[[], float] = time.time) -> None:
    """Raise ClockError unless it was signed about now. `clock` gives Unix seconds."""
    if abs(clock() - proof.timestamp) > WINDOW_SECONDS:
        raise ClockError


def check_signature(identity: NodeIdentity, proof: IdentityProof, request: SignedRequest) -> None:
    """Raise SignatureError unless the identity's key signed this request at the time that the proof states.

    The request's audience is this hub's own public key, never one that the caller names. The caller of this
    function checks the time and the nonce.
    """
    if not identity.verify(proof.signature, request.message(proof.timestamp, proof.nonce)):
        raise SignatureError


@dataclass(frozen=True, slots=True)
class Challenge:
    """What only the holder of one WireGuard key can answer. The middle two are base64 of 32 bytes each."""

    challenge_id: str
    server_public_key: str
    challenge: str
    # Seconds from when it was made.
    expires_in: int = CHALLENGE_SECONDS


@dataclass(frozen=True, slots=True)
class WireGuardProof:
    """The answer to a challenge."""

    challenge_id: str
    mac: bytes

    @classmethod
    def parse(cls, challenge_id: str | None, mac: str | None) -> Self:
        """Read the two headers; raise ProofMissingError or ChallengeError."""
        challenge_id = _present(CHALLENGE_HEADER, challenge_id)
        return cls(challenge_id, _decode(_present(WIREGUARD_PROOF_HEADER, mac), _MAC_BYTES, ChallengeError))

    def headers(self) -> dict[str, str]:
        """Return what `parse` reads, by name."""
        return {CHALLENGE_HEADER: self.challenge_id, WIREGUARD_PROOF_HEADER: encode_base64(self.mac)}


def answer_challenge(private_key: WireGuardPrivateKey, challenge: Challenge, body_sha256: bytes) -> bytes:
    """Return the MAC that proves, for this one body, that the node holds the private half of its key.

    Raises ChallengeError if the challenge is none.
    """
    try:
        server = decode_base64(WireGuardKey.parse(challenge.server_public_key))
        question = decode_base64(challenge.challenge)
    except ValueError as exc:
        raise ChallengeError from exc
    node = decode_base64(private_key.public_key())
    own = X25519PrivateKey.from_private_bytes(decode_base64(private_key.reveal()))
    mac_key = _mac_key(_agree(own, server), server, node, challenge.challenge_id)
    return _mac(mac_key, challenge.challenge_id, question, body_sha256)


@dataclass(frozen=True, slots=True)
class ExpectedAnswer:
    """What the hub keeps of a challenge to check its answer. No private key is among it."""

    key: WireGuardKey
    question: bytes
    mac_key: bytes = field(repr=False)

    def is_given(self, challenge_id: str, key: WireGuardKey, mac: bytes, body_sha256: bytes) -> bool:
        """Say whether this is the answer, for this key and this body. Takes the same time for every MAC."""
        expected = _mac(self.mac_key, challenge_id, self.question, body_sha256)
        return self.key == key and hmac.compare_digest(mac, expected)


def make_challenge(key: WireGuardKey) -> tuple[Challenge, ExpectedAnswer]:
    """Make a challenge for the holder of a key; raise ChallengeError for a key of low order."""
    challenge_id, question = secrets.token_hex(16), secrets.token_bytes(32)
    ephemeral = X25519PrivateKey.generate()
    server, node = ephemeral.public_key().public_bytes_raw(), decode_base64(key)
    # The agreement is made now, so that the private half is never kept.
    mac_key = _mac_key(_agree(ephemeral, node), server, node, challenge_id)
    challenge = Challenge(challenge_id, encode_base64(server), encode_base64(question))
    return challenge, ExpectedAnswer(key, question, mac_key)


def _framed(*fields: bytes) -> bytes:
    """Put each field's length before it, so that what follows can't be taken for a part of it."""
    return b"".join(len(each).to_bytes(4, "big") + each for each in fields)


def _agree(private_key: X25519PrivateKey, public_key: bytes) -> bytes:
    try:
        return private_key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as exc:
        # All zero: the other key is of low order, and the secret is known to all (RFC 7748, section 6.1).
        raise ChallengeError from exc


def _mac_key(shared: bytes, server: bytes, node: bytes, challenge_id: str) -> bytes:
    info = _framed(_WIREGUARD_DOMAIN, server, node, challenge_id.encode())
    return HKDF(SHA256(), length=32, salt=None, info=info).derive(shared)


def _mac(mac_key: bytes, challenge_id: str, question: bytes, body_sha256: bytes) -> bytes:
    message = _framed(_WIREGUARD_DOMAIN, challenge_id.encode(), question, body_sha256)
    return hmac.digest(mac_key, message, "sha256")


def _present(header: str, value: str | None) -> str:
    if value is None:
        raise ProofMissingError(header)
    return value


def _decode(text: str, size: int, error: type[ProofError]) -> bytes:
    """Read `size` bytes of canonical base64; raise the error where the text is anything else."""
    with suppress(ValueError):
        raw = decode_base64(text)
        if len(raw) == size:
            return raw
    raise error
