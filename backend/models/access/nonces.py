"""What a signed request may be sent with only once."""

from datetime import datetime
from typing import NamedTuple


class Nonce(NamedTuple):
    """A nonce of an identity (its PeerID), to be kept until its signature is good no more."""

    identity: str
    nonce: str
    expires_at: datetime
