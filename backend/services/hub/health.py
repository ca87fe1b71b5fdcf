"""Finds out each peer's state from successive looks at the interface (`wg show NAME dump`).

Data from a peer, or a handshake, is a sign of life. The state depends on the time from the last sign of life
to the last good look, by this process's monotonic clock: WireGuard stamps handshakes by the wall clock, which
may jump. So a look that fails changes no state.
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

# An endpoint that was last good longer ago isn't set on a new interface: seconds.
ENDPOINT_KEPT_SECONDS: Final = 86_400.0
# How often the records get a new time for an endpoint that hasn't changed: seconds.
ENDPOINT_REFRESH_SECONDS: Final = 3_600.0
# No session lasts longer, so nothing was heard of a peer later than this after its last handshake: seconds.
# REJECT-AFTER-TIME of the WireGuard paper.
_SESSION_SECONDS: Final = 180.0
# An address and a port without a scope (`%eth0`): `wg` refuses a scope that the host doesn't have.
_RESTORABLE: Final = re.compile(r"(?:[0-9.]{7,15}|\[[0-9a-f:.]{2,45}\]):[0-9]{1,5}")


@dataclass(slots=True)
class _Sighting:
    """What the looks have shown of one peer. The times are time.monotonic()'s."""

    # Whom it is of: a key that was removed may come back with another peer. None until the first look.
    peer: Peer | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    # The interface's time of the last handshake, 0 for none. Only compared: it is by the wall clock.
    latest_handshake: int = 0
    persistent_keepalive: int = 0
    # The last sign of life, plus the time since then without an interface; None if there was none.
    alive_at: float | None = None
    handshake_at: float | None = None
    # The last endpoint on the interface, and when the peer last showed a sign of life there.
    endpoint: str | None = None
    endpoint_at: float = 0.0
    # The endpoint that the records have, and its `endpoint_at` there.
    recorded: str | None = None
    recorded_at: float = 0.0

    def is_of(self, peer: Peer) -> bool:
        """Say whether this is the peer that was looked at, and not one that has its key by now."""
        known = self.peer
        return (
            known is None
            or known is peer
            or (known.node_id, known.provisioned_at) == (peer.node_id, peer.provisioned_at)
        )


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
        """`hub_key` returns the hub's public key.

        `on_flapping` is called with the node_id of a peer whose endpoint begins to go back and forth,
        `on_first_handshake` with the seconds from a peer's provision to its first handshake.
        """
        self._directory = directory
        self._hub_key = hub_key
        self._suspect_after = suspect_after
        self._offline_after = offline_after
        self._on_first_handshake = on_first_handshake
        self._flapping = EndpointFlapping(on_flapping)
        # In whole seconds, as `provisioned_at` is, so that the two can be compared.
        self._started_at = datetime.now(UTC).replace(microsecond=0)
        self._sightings: dict[WireGuardKey, _Sighting] = {}
        self._ifindex: int | None = None
        # The last good look, by time.monotonic(); and what counts as one before the first.
        self._looked: float | None = None
        self._loaded = time.monotonic()
        # The same by time.time(); and the interface's UDP port then.
        self.looked_at: float | None = None
        self.listen_port: int | None = None
        # Why the last look failed, or None; and whether that is because there is no interface of this hub.
        self.problem: str | None = "the interface has not been looked at yet"
        self.is_away = True

    def load(self, endpoints: Mapping[str, RecordedEndpoint]) -> None:
        """Take over the endpoints of the records: these peers showed signs of life to an earlier process."""
        now, wall = time.monotonic(), time.time()
        self._loaded = now
        for text, recorded in endpoints.items():
            age = wall - recorded.seen_at.timestamp()
            seen = _Sighting(endpoint=recorded.endpoint, recorded=recorded.endpoint)
            # A time in the future: the clock was or is wrong, so the endpoint counts as too old to be set.
            seen.endpoint_at = seen.recorded_at = now - (age if age >= 0 else ENDPOINT_KEPT_SECONDS)
            # The last sign of life may be later than `seen_at`, which is written no more often than this.
            seen.alive_at = now - max(0.0, age - ENDPOINT_REFRESH_SECONDS)
            self._sightings[WireGuardKey(text)] = seen

    def observe(self, state: InterfaceState, ifindex: int | None) -> None:
        """Update each peer from a look. An interface with another key, or without one, is not the hub's."""
        if state.public_key != self._hub_key():
            self.note_failure("the interface doesn't have the hub's key", is_away=True)
            return
        now = time.monotonic()
        if ifindex != self._ifindex:
            # The interface is new. The time without one doesn't count against the peers.
            self._shift_signs_of_life(now - self._last_looked)
        found = 0
        for key, present in state.peers.items():
            peer = self._directory.by_key(WireGuardKey(key))
            if peer is None:
                continue
            found += 1
            seen = self._sightings.get(peer.wireguard_public_key)
            if seen is None or not seen.is_of(peer):
                seen = self._sightings[peer.wireguard_public_key] = _Sighting()
            seen.peer = peer
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
        """Return, by key, the last endpoint of each peer that has none now, if it is recent enough.

        Not a link-local one: its scope names a network interface of the host, and if that name is gone,
        `wg set` fails for every peer of the same call.
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
        """Return, by key, the endpoints that are new or whose time in the records is an hour old."""
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

    @property
    def _last_looked(self) -> float:
        return self._loaded if self._looked is None else self._looked

    def _shift_signs_of_life(self, seconds: float) -> None:
        for seen in self._sightings.values():
            if seen.alive_at is not None:
                seen.alive_at += seconds

    def _note(self, peer: Peer, seen: _Sighting, present: InterfacePeer, now: float) -> None:
        known_before = seen.alive_at is not None
        alive_at = self._sign_of_life(seen, present, now)
        if alive_at is not None:
            if self._looked is None and seen.alive_at is not None:
                # The records may say too late a time, but never by more than the kernel's stamp allows.
                seen.alive_at = min(seen.alive_at, alive_at + _SESSION_SECONDS)
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
        """Return the time of a sign of life since the look before, or None if there was none."""
        # A counter or a time that goes back to 0 belongs to a new interface, and is no sign of life.
        if present.latest_handshake not in {0, seen.latest_handshake}:
            if self._looked is None:
                # Made before the first look, so only the interface's own time says when.
                now -= max(0.0, time.time() - present.latest_handshake)
            seen.handshake_at = now
            return now
        # At the first look there is no earlier counter to compare with, and bytes that a peer without a
        # completed handshake has sent are the handshake's own.
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
        """Return the seconds from the last sign of life to the last good look; None without any."""
        if seen is None or seen.alive_at is None:
            return None
        return max(0.0, self._last_looked - seen.alive_at)

    def _state(self, silence: float | None) -> HealthState:
        if silence is None:
            return HealthState.NEVER
        if silence < self._suspect_after:
            return HealthState.ONLINE
        return HealthState.SUSPECT if silence < self._offline_after else HealthState.OFFLINE


_NOT_LOOKED_AT: Final = _Sighting()
