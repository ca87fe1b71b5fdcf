"""Follows each peer's signs of life from look to look at the interface.

A sign of life is data that arrives from a peer, or a handshake. The time since the last one decides about
the peer's state. It is measured by this process's monotonic clock, because the kernel stamps handshakes by
the wall clock, which may jump. Looks that fail change no state: the time since the last good one doesn't
count against a peer.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from backend.models.wireguard.health import HealthState, PeerHealth, RecordedEndpoint
from backend.models.wireguard.interface import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services.hub.endpoint_flapping import EndpointFlapping
from backend.services.peer_directory import PeerDirectory

# An endpoint that was learned longer ago isn't given back to an interface: seconds.
ENDPOINT_KEPT_SECONDS: Final = 86_400.0
# The records are told that a known endpoint is still good so often: seconds.
ENDPOINT_REFRESH_SECONDS: Final = 3_600.0
# An address and a port that `wg` takes whatever interfaces the host has.
_RESTORABLE: Final = re.compile(r"(?:[0-9.]{7,15}|\[[0-9a-f:.]{2,45}\]):[0-9]{1,5}")


@dataclass(slots=True)
class _Sighting:
    """What the looks have shown of one peer. The times are time.monotonic()'s."""

    received_bytes: int = 0
    sent_bytes: int = 0
    # The kernel's stamp of the last handshake, 0 for none; it is compared, and no age is made of it.
    latest_handshake: int = 0
    persistent_keepalive: int = 0
    # The last sign of life, put off by the times without an interface; None for a peer that was never seen.
    alive_at: float | None = None
    handshake_at: float | None = None
    # The last endpoint that the interface has learned, and when it was certainly good.
    endpoint: str | None = None
    endpoint_at: float = 0.0
    # The endpoint that the records have, and its `endpoint_at` there.
    recorded: str | None = None
    recorded_at: float = 0.0


class HealthMonitor:
    """The health of the hub's peers. One thread at a time calls `observe`; any thread may read."""

    def __init__(  # noqa: PLR0913 - two parts, two limits, two hooks
        self,
        directory: PeerDirectory,
        hub_key: Callable[[], str],
        *,
        suspect_after: float = 75.0,
        offline_after: float = 180.0,
        on_flapping: Callable[[str], None] = lambda _node_id: None,
        on_first_handshake: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        """Know no peer yet. `hub_key` returns the hub's public key.

        `on_flapping` is called with the node_id of a peer whose endpoint begins to go back and forth,
        `on_first_handshake` with the seconds from a peer's provision to its first handshake.
        """
        self._directory = directory
        self._hub_key = hub_key
        self._suspect_after = suspect_after
        self._offline_after = offline_after
        self._on_first_handshake = on_first_handshake
        self._flapping = EndpointFlapping(on_flapping)
        # As exact as `provisioned_at`.
        self._started_at = datetime.now(UTC).replace(microsecond=0)
        self._sightings: dict[WireGuardKey, _Sighting] = {}
        self._ifindex: int | None = None
        # The last good look, by time.monotonic().
        self._looked: float | None = None
        # The same by time.time(); and the interface's UDP port then.
        self.looked_at: float | None = None
        self.listen_port: int | None = None
        # Why the last look failed, or None; and whether that is because there is no interface of this hub.
        self.problem: str | None = "the interface has not been looked at yet"
        self.is_away = True

    def load(self, endpoints: Mapping[str, RecordedEndpoint]) -> None:
        """Take the endpoints of the records: these peers were seen before this process began."""
        now, wall = time.monotonic(), time.time()
        for text, recorded in endpoints.items():
            age = wall - recorded.seen_at.timestamp()
            seen = _Sighting(endpoint=recorded.endpoint, recorded=recorded.endpoint)
            # From the future: the clock was wrong then or is wrong now, so the endpoint may be of any age.
            seen.endpoint_at = seen.recorded_at = now - (age if age >= 0 else ENDPOINT_KEPT_SECONDS)
            # The records may be so much behind the peer's last sign of life.
            seen.alive_at = now - max(0.0, age - ENDPOINT_REFRESH_SECONDS)
            self._sightings[WireGuardKey(text)] = seen

    def observe(self, state: InterfaceState, ifindex: int | None) -> None:
        """Take a look's outcome. An interface with another key, or without one yet, is not the hub's."""
        if state.public_key != self._hub_key():
            self.note_failure("the interface doesn't have the hub's key", is_away=True)
            return
        now = time.monotonic()
        if self._looked is not None and ifindex != self._ifindex:
            # While there was no interface no peer could be heard.
            self._put_off(now - self._looked)
        found = 0
        for key, present in state.peers.items():
            peer = self._directory.by_key(WireGuardKey(key))
            if peer is None:
                continue
            found += 1
            seen = self._sightings.get(peer.wireguard_public_key)
            if seen is None:
                seen = self._sightings[peer.wireguard_public_key] = _Sighting()
            self._note(peer, seen, present, now)
        if len(self._sightings) > found:
            for key in [key for key in self._sightings if self._directory.by_key(key) is None]:
                del self._sightings[key]
        self._flapping.tidy(now)
        self._ifindex = ifindex
        self._looked, self.looked_at = now, time.time()
        self.listen_port = state.listen_port
        self.problem, self.is_away = None, False

    def note_failure(self, reason: str, *, is_away: bool) -> None:
        """Note that a look has failed; `is_away` says that there is no interface of this hub."""
        self.problem, self.is_away = reason, is_away

    def peer(self, node_id: str) -> PeerHealth:
        """Return one peer's health; raise PeerNotFoundError."""
        return self._health(self._directory.listed(node_id))

    def peers(self) -> Iterator[PeerHealth]:
        """Yield the health of each listed peer, in the order in which they were added."""
        return map(self._health, self._directory.list())

    def states(self) -> Iterator[HealthState]:
        """Yield the state of each listed peer."""
        for peer in self._directory.list():
            yield self._state(self._silence(self._sightings.get(peer.wireguard_public_key)))

    def handshake_ages(self) -> Iterator[float]:
        """Yield the seconds since the last handshake of each peer that has made one."""
        looked = self._looked
        for seen in tuple(self._sightings.values()):
            if looked is not None and seen.handshake_at is not None:
                yield max(0.0, looked - seen.handshake_at)

    @property
    def flapping(self) -> int:
        """How many peers' endpoints go back and forth."""
        return len(self._flapping)

    def lost_endpoints(self, state: InterfaceState) -> dict[str, str]:
        """Return the last endpoint of each peer that has none on the interface, where it is recent enough.

        A link-local one isn't returned: it names a network interface of the hub, and `wg set` fails for all
        peers if that has another name by now.
        """
        since = time.monotonic() - ENDPOINT_KEPT_SECONDS
        lost = {}
        for key, present in state.peers.items():
            if present.endpoint is None:
                seen = self._sightings.get(WireGuardKey(key))
                if seen is None or seen.endpoint is None or seen.endpoint_at <= since:
                    continue
                if _RESTORABLE.fullmatch(seen.endpoint):
                    lost[key] = seen.endpoint
        return lost

    def unrecorded_endpoints(self) -> dict[str, RecordedEndpoint]:
        """Return the endpoints that the records don't have yet, or have with a time that is too old."""
        now, wall = time.monotonic(), time.time()
        return {
            key: RecordedEndpoint(seen.endpoint, datetime.fromtimestamp(wall - (now - seen.endpoint_at), UTC))
            for key, seen in tuple(self._sightings.items())
            if seen.endpoint is not None
            and seen.alive_at is not None
            and (
                seen.endpoint != seen.recorded
                or seen.endpoint_at - seen.recorded_at >= ENDPOINT_REFRESH_SECONDS
            )
        }

    def note_recorded(self, endpoints: Mapping[str, RecordedEndpoint]) -> None:
        """Note that the records have these endpoints."""
        offset = time.monotonic() - time.time()
        for key, recorded in endpoints.items():
            seen = self._sightings.get(WireGuardKey(key))
            if seen is not None:
                seen.recorded, seen.recorded_at = recorded.endpoint, recorded.seen_at.timestamp() + offset

    def _put_off(self, seconds: float) -> None:
        for seen in self._sightings.values():
            if seen.alive_at is not None:
                seen.alive_at += seconds

    def _note(self, peer: Peer, seen: _Sighting, present: InterfacePeer, now: float) -> None:
        known_before = seen.alive_at is not None
        alive_at = self._sign_of_life(seen, present, now)
        if alive_at is not None:
            seen.alive_at = alive_at if seen.alive_at is None else max(seen.alive_at, alive_at)
        if not known_before and alive_at is not None and peer.provisioned_at >= self._started_at:
            self._on_first_handshake(max(0.0, present.latest_handshake - peer.provisioned_at.timestamp()))
        if present.endpoint is not None and present.endpoint != seen.endpoint:
            self._flapping.note(peer.node_id, seen.endpoint, present.endpoint, now)
            seen.endpoint, seen.endpoint_at = present.endpoint, now if alive_at is None else alive_at
        elif present.endpoint is not None and alive_at is not None:
            seen.endpoint_at = max(seen.endpoint_at, alive_at)
        seen.latest_handshake = present.latest_handshake
        seen.received_bytes, seen.sent_bytes = present.received_bytes, present.sent_bytes
        seen.persistent_keepalive = present.persistent_keepalive

    def _sign_of_life(self, seen: _Sighting, present: InterfacePeer, now: float) -> float | None:
        """Return when a peer has shown the sign of life that is new in this look, or None without one."""
        # A counter or a stamp that goes back to 0 belongs to a new interface, and is no sign of life.
        if present.latest_handshake not in {0, seen.latest_handshake}:
            if self._looked is None:
                # Made before the first look: there is only the kernel's stamp to go by.
                now -= max(0.0, time.time() - present.latest_handshake)
            seen.handshake_at = now
            return now
        # Before the first look there is nothing to compare a counter with, and data that arrives before the
        # first handshake is the handshake's own.
        is_comparable = self._looked is not None and seen.alive_at is not None
        return now if is_comparable and present.received_bytes not in {0, seen.received_bytes} else None

    def _health(self, peer: Peer) -> PeerHealth:
        seen = self._sightings.get(peer.wireguard_public_key) or _NOT_LOOKED_AT
        silence = self._silence(seen)
        looked, handshake_at = self._looked, seen.handshake_at
        return PeerHealth(
            peer=peer,
            state=self._state(silence),
            endpoint=seen.endpoint,
            received_bytes=seen.received_bytes,
            sent_bytes=seen.sent_bytes,
            persistent_keepalive=seen.persistent_keepalive,
            handshake_age=None if looked is None or handshake_at is None else max(0.0, looked - handshake_at),
            silent_seconds=silence,
            endpoint_flapping=peer.node_id in self._flapping,
        )

    def _silence(self, seen: _Sighting | None) -> float | None:
        """Return the seconds without a sign of life up to the last good look; None if there was never one."""
        if seen is None or seen.alive_at is None:
            return None
        return max(0.0, (self._looked or seen.alive_at) - seen.alive_at)

    def _state(self, silence: float | None) -> HealthState:
        if silence is None:
            return HealthState.NEVER
        if silence < self._suspect_after:
            return HealthState.ONLINE
        return HealthState.SUSPECT if silence < self._offline_after else HealthState.OFFLINE


_NOT_LOOKED_AT: Final = _Sighting()
