"""The health of the hub is the sum of its peers'."""

import asyncio
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from backend.api.v1.endpoints import wireguard_health as endpoints
from backend.models.access.callers import SERVICE
from backend.models.wireguard.health import HealthState, PeerHealth
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services import pieces
from backend.services.hub.hub_health import HealthReport, HealthStatus
from tests.harness.core import World
from tests.harness.peers import NOON
from tests.harness.requests import new_key

NODE = Peer("node-1", "libp2p", WireGuardKey(new_key()), IPv4Address("10.0.0.2"), NOON)


def seen(silent_seconds: float | None) -> PeerHealth:
    return PeerHealth(NODE, HealthState.ONLINE, received_bytes=3, sent_bytes=5, silent_seconds=silent_seconds)


def report(*silences: float | None, is_away: bool = False) -> HealthReport:
    summed = HealthReport(300, is_away=is_away)
    for silent_seconds in silences:
        summed.add(seen(silent_seconds))
    return summed


@pytest.mark.parametrize(
    ("silences", "status"),
    [
        ((), HealthStatus.HEALTHY),
        ((0.0, 300.0), HealthStatus.HEALTHY),
        ((None, None), HealthStatus.HEALTHY),
        ((0.0, 300.1), HealthStatus.DEGRADED),
        ((301.0, 302.0), HealthStatus.UNHEALTHY),
        # A peer that was never there makes no difference.
        ((301.0, None), HealthStatus.UNHEALTHY),
        ((0.0, None), HealthStatus.HEALTHY),
    ],
)
def test_status_depends_on_the_peers_that_were_ever_seen(
    silences: tuple[float | None, ...], status: HealthStatus
) -> None:
    assert report(*silences).status is status


def test_a_hub_without_an_interface_is_unhealthy_even_without_peers() -> None:
    assert report(is_away=True).status is HealthStatus.UNHEALTHY
    assert report(0.0, is_away=True).status is HealthStatus.UNHEALTHY


def test_a_peer_that_was_never_seen_counts_in_the_number_of_peers_alone() -> None:
    summed = report(None, 0.0, 999.0)
    assert (summed.peer_count, summed.healthy_peers, len(summed.stale_keys)) == (3, 1, 1)
    assert (summed.received_bytes, summed.sent_bytes) == (9, 15)


def test_requests_tell_of_the_peers_one_after_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives way to all others after some peers: with many at once a provision would wait for all."""
    running, most = 0, 0

    def peers() -> Iterator[PeerHealth]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        yield from [seen(0.0)] * 3
        running -= 1

    async def ask() -> list[object]:
        query = endpoints.HealthQuery(include_peers=True)
        return await asyncio.gather(*(endpoints.get_health(query, SERVICE, world.service) for _ in range(5)))

    monkeypatch.setattr(pieces, "PIECE", 1)
    monkeypatch.setattr(world.health, "peers", peers)
    answers = asyncio.run(ask())
    assert (len(answers), most) == (5, 1)
