"""What the hub has seen of a peer: its state, and the figures behind it."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from backend.models.wireguard.peer import Peer


class HealthState(StrEnum):
    """Whether a peer shows signs of life: data that arrives from it, or a handshake."""

    # The peer has made no handshake yet.
    NEVER = "never"
    ONLINE = "online"
    # No sign of life for a while that is too short to call the peer offline.
    SUSPECT = "suspect"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class PeerHealth:
    """One of our peers as the last look at the interface showed it.

    Ages are in seconds, measured by the service's monotonic clock, and None for a peer that was never seen.
    `persistent_keepalive` is in seconds, 0 for off.
    """

    peer: Peer
    state: HealthState
    endpoint: str | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    persistent_keepalive: int = 0
    handshake_age: float | None = None
    silent_seconds: float | None = None
    # Whether the key's endpoint goes back and forth, as when two nodes have the same key.
    endpoint_flapping: bool = False


@dataclass(frozen=True, slots=True)
class RecordedEndpoint:
    """The address and port, as `wg` prints them, at which a peer was seen last, and when that was, in UTC."""

    endpoint: str
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class LostEndpoint:
    """A peer that gets its endpoint back. It has this `persistent_keepalive`, in seconds, 0 for off."""

    public_key: str
    endpoint: str
    persistent_keepalive: int
