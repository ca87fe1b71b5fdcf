"""The health of the whole hub, summed up from its peers'."""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from backend.errors import InterfaceNotFoundError
from backend.models.wireguard.health import PeerHealth
from backend.models.wireguard.interface import InterfaceName
from backend.services.hub.health import HealthMonitor
from backend.services.hub.interface_observer import InterfaceObserver


class HealthStatus(StrEnum):
    """How many peers are stale. Peers that have made no handshake yet don't count."""

    # None.
    HEALTHY = "healthy"
    # Some.
    DEGRADED = "degraded"
    # All, or there is no interface.
    UNHEALTHY = "unhealthy"


@dataclass(slots=True)
class HealthReport:
    """The sums for `GET /health`. A peer is stale after `stale_threshold` seconds without a sign of life."""

    stale_threshold: float
    is_away: bool
    peer_count: int = 0
    healthy_peers: int = 0
    stale_keys: list[str] = field(default_factory=list)
    received_bytes: int = 0
    sent_bytes: int = 0

    def is_stale(self, peer: PeerHealth) -> bool:
        """Say whether a peer has shown a sign of life once, but none within `stale_threshold`."""
        return peer.silent_seconds is not None and peer.silent_seconds > self.stale_threshold

    def add(self, peer: PeerHealth) -> None:
        """Count a peer. One that has made no handshake yet is neither healthy nor stale."""
        self.peer_count += 1
        self.received_bytes += peer.received_bytes
        self.sent_bytes += peer.sent_bytes
        if self.is_stale(peer):
            self.stale_keys.append(peer.peer.wireguard_public_key)
        elif peer.silent_seconds is not None:
            self.healthy_peers += 1

    @property
    def status(self) -> HealthStatus:
        """The status of the hub with these peers."""
        if self.is_away or (self.stale_keys and not self.healthy_peers):
            return HealthStatus.UNHEALTHY
        return HealthStatus.DEGRADED if self.stale_keys else HealthStatus.HEALTHY


class HubHealth:
    """What the health endpoints need: the peers' health, and a look at the interface before they answer."""

    def __init__(
        self, interface: InterfaceName, monitor: HealthMonitor, observer: InterfaceObserver, *, live: bool
    ) -> None:
        """`live` is False with WIREGUARD_RELOAD=off: there is no interface to look at."""
        self.interface = interface
        self.monitor = monitor
        self._observer = observer
        self._live = live
        # Held while all peers are told of: many requests at once would each take a turn between two others.
        self.one_report: Final = asyncio.Lock()

    def require_interface(self, name: str | None) -> None:
        """Raise InterfaceNotFoundError for the name of another interface than this hub's."""
        if name is not None and name != self.interface:
            raise InterfaceNotFoundError(self.interface)

    def refresh(self) -> "Future[None]":
        """Start a look, unless there was one within the last second; return a future that ends with it."""
        return self._observer.ask()

    @property
    def problem(self) -> str | None:
        """Why the last look failed, or None."""
        if not self._live:
            return "WIREGUARD_RELOAD=off: no interface is looked at"
        problem = self.monitor.problem
        return None if problem is None else f"{self.interface}: {problem}"

    def report(self, stale_threshold: float) -> HealthReport:
        """Return an empty report, to which the caller adds the peers."""
        return HealthReport(stale_threshold, is_away=self.monitor.is_away)
