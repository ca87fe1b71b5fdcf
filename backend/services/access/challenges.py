"""Checks the proofs of a node's two keys, the cheap ones first."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from backend.errors import InvalidCredentialsError, NonceError
from backend.models.access.identity import NodeIdentity
from backend.models.access.nonces import Nonce
from backend.models.access.proof import (
    MAX_CHALLENGES,
    WINDOW_SECONDS,
    IdentityProof,
    WireGuardChallenges,
    WireGuardProof,
    check_clock,
    check_signature,
)
from backend.models.wireguard.keys import WireGuardKey

# From the earliest moment at which the clock lets a signature pass to a second after the last.
_LONGEST_SECONDS: Final = 2 * WINDOW_SECONDS + 1


@dataclass(frozen=True, slots=True)
class Proof:
    """What a request brings along to prove whose it is, and what of it was signed."""

    identity: IdentityProof
    wireguard: WireGuardProof
    method: str
    path: str
    # The hub's own public key.
    audience: str
    body_sha256: bytes


class ProofVerifier:
    """Issues challenges, and checks the proofs that come back. May be used by many threads.

    A request passes once: its challenge is answered for good, so that its copy fails from then on, after a
    restart as well, which forgets all challenges. The signature's nonce is remembered here, for whoever puts
    the same signature beside a new challenge; it is for the caller to have it kept in the transaction that
    the request ends in. So a request that is refused has cost the records nothing.
    """

    def __init__(
        self,
        challenges: WireGuardChallenges,
        clock: Callable[[], float] = time.monotonic,
        limit: int = MAX_CHALLENGES,
    ) -> None:
        self.challenges: Final = challenges
        self._clock = clock
        self._limit = limit
        self._lock = threading.Lock()  # guards _seen
        # (identity, nonce) -> when it is forgotten. All are kept equally long: the oldest comes first.
        self._seen: OrderedDict[tuple[str, str], float] = OrderedDict()

    def verify(self, proof: Proof, public_key: str, key: WireGuardKey) -> tuple[NodeIdentity, Nonce]:
        """Return who sent it, and the nonce to be kept, where the sender holds both keys.

        Raises a ProofError, or InvalidCredentialsError where `public_key` is no identity. Takes half a
        millisecond at most, and waits for nothing.
        """
        check_clock(proof.identity)
        self.challenges.redeem(proof.wireguard.challenge_id, key, proof.wireguard.mac, proof.body_sha256)
        try:
            # As costly as the signature: that the bytes are a point on the curve takes a power.
            identity = NodeIdentity.parse(public_key)
        except ValueError as exc:
            raise InvalidCredentialsError("public_key", str(exc)) from None
        check_signature(
            identity,
            proof.identity,
            method=proof.method,
            path=proof.path,
            audience=proof.audience,
            body_sha256=proof.body_sha256,
        )
        # A second longer than the clock lets it pass.
        until = datetime.fromtimestamp(proof.identity.valid_until + 1, UTC)
        nonce = Nonce(identity.peer_id, proof.identity.nonce, until)
        self._remember((nonce.identity, nonce.nonce))
        return identity, nonce

    def _remember(self, seen: tuple[str, str]) -> None:
        with self._lock:
            now = self._clock()
            while self._seen:
                oldest, until = next(iter(self._seen.items()))
                if until > now and len(self._seen) < self._limit:
                    break
                del self._seen[oldest]
            if seen in self._seen:
                raise NonceError
            self._seen[seen] = now + _LONGEST_SECONDS
