"""Issues challenges to WireGuard keys, and checks the proofs of a node's two keys, the cheap ones first."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Final, Generic, TypeVar

from backend.errors import ChallengeError, InvalidCredentialsError, NonceError
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_SECONDS,
    WINDOW_SECONDS,
    Challenge,
    ExpectedAnswer,
    IdentityProof,
    Nonce,
    SignedRequest,
    WireGuardProof,
    check_clock,
    check_signature,
    make_challenge,
)
from backend.models.wireguard.keys import WireGuardKey

# The most outstanding challenges (about 60 MB), and the most remembered nonces.
MOST_KEPT: Final = 100_000
# A signature is accepted WINDOW_SECONDS before and after its timestamp; one second more than that.
_NONCE_SECONDS: Final = 2 * WINDOW_SECONDS + 1

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Proof:
    """The two proofs that a request carries, and the request that they sign."""

    identity: IdentityProof
    wireguard: WireGuardProof
    request: SignedRequest


class _Expiring(Generic[_Value]):
    """Values that are all kept equally long, in seconds of a clock that never goes back. Thread-safe.

    Where there are too many the oldest goes.
    """

    def __init__(self, seconds: float, limit: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._limit = limit
        self._clock = clock
        self._lock = Lock()  # guards _values, in the order in which they expire
        self._values: OrderedDict[Hashable, tuple[float, _Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def add(self, name: Hashable, value: _Value) -> bool:
        """Keep a value; return False where one of this name is kept already."""
        with self._lock:
            now = self._clock()
            self._drop_expired(now)
            if name in self._values:
                return False
            if len(self._values) >= self._limit:
                self._values.popitem(last=False)
            self._values[name] = now + self._seconds, value
            return True

    def take(self, name: Hashable) -> _Value | None:
        """Return a value and keep it no longer, or return None."""
        with self._lock:
            self._drop_expired(self._clock())
            found = self._values.pop(name, None)
        return None if found is None else found[1]

    def _drop_expired(self, now: float) -> None:
        while self._values:
            expires_at, _ = next(iter(self._values.values()))
            if now <= expires_at:
                break
            self._values.popitem(last=False)


class WireGuardChallenges:
    """The challenges that wait for their answer: in memory, each for one key, one try and 60 seconds."""

    # When there are too many, the oldest challenge is dropped and no node is refused. To push out an honest
    # node's challenge, an attacker with a token has to be given MOST_KEPT challenges before the node answers
    # its own. Making those takes a core ten seconds, and the node need only ask again. A limit for each
    # WireGuard key would help an attacker, who could use up another node's: public keys are public.

    def __init__(self, clock: Callable[[], float] = time.monotonic, limit: int = MOST_KEPT) -> None:
        self._outstanding = _Expiring[ExpectedAnswer](CHALLENGE_SECONDS, limit, clock)

    def __len__(self) -> int:
        return len(self._outstanding)

    def issue(self, key: WireGuardKey) -> Challenge:
        """Make a challenge for the holder of a key; raise ChallengeError for a key of low order."""
        challenge, expected = make_challenge(key)
        self._outstanding.add(challenge.challenge_id, expected)
        return challenge

    def redeem(self, challenge_id: str, key: WireGuardKey, mac: bytes, body_sha256: bytes) -> None:
        """Raise ChallengeError unless this is the answer, for this key and this body. There is one try."""
        expected = self._outstanding.take(challenge_id)
        if expected is None or not expected.is_given(challenge_id, key, mac, body_sha256):
            raise ChallengeError


class ProofVerifier:
    """Checks the proofs of a request. May be used by many threads.

    A request passes once: its challenge is answered for good, so that its copy fails from then on, after a
    restart as well, which forgets all challenges. The signature's nonce is remembered here, against the same
    signature beside a new challenge; the caller has it kept in the transaction that writes the change. So a
    request that is refused has cost the records nothing.
    """

    def __init__(
        self,
        challenges: WireGuardChallenges,
        clock: Callable[[], float] = time.monotonic,
        limit: int = MOST_KEPT,
    ) -> None:
        self.challenges: Final = challenges
        # By identity and nonce.
        self._seen = _Expiring[None](_NONCE_SECONDS, limit, clock)

    def verify(self, proof: Proof, public_key: str, key: WireGuardKey) -> tuple[NodeIdentity, Nonce]:
        """Return the sender's identity and the nonce to be recorded, where the sender holds both keys.

        Raises a ProofError, or InvalidCredentialsError where `public_key` is no identity. Takes half a
        millisecond at most, and waits for nothing.
        """
        check_clock(proof.identity)
        answer, request = proof.wireguard, proof.request
        self.challenges.redeem(answer.challenge_id, key, answer.mac, request.body_sha256)
        try:
            # As costly as the signature: a modular power shows whether the bytes are a point on the curve.
            identity = NodeIdentity.parse(public_key)
        except ValueError as exc:
            raise InvalidCredentialsError("public_key", str(exc)) from None
        check_signature(identity, proof.identity, request)
        # A second longer than the signature passes.
        until = datetime.fromtimestamp(proof.identity.valid_until + 1, UTC)
        nonce = Nonce(identity.peer_id, proof.identity.nonce, until)
        if not self._seen.add((nonce.identity, nonce.nonce), None):
            raise NonceError
        return identity, nonce
