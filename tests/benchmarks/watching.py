"""What metrics and health cost: CPU time for each provision, and a scrape."""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from backend.adapters.metrics.prometheus import PrometheusMetrics
from backend.adapters.metrics.state import State
from backend.models.wireguard.health import HealthState, PeerHealth
from tests.benchmarks.against import Ratio, Side, cpu_ms, in_turns
from tests.benchmarks.parts import Bench
from tests.harness.core import NEVER, World
from tests.harness.scrapes import FakeHealth

# The settings of a service without metrics and health.
_OFF: Final = {"WIREGUARD_METRICS": "false", "WIREGUARD_HEALTH_INTERVAL": "0"}
_CLIENTS: Final = 64
_LOAD: Final = 400
_CHUNKS: Final = 4
_CHUNK: Final = 25
_SCRAPES: Final = 15
_ROUTES: Final = 20


def cpu_of_watching(directory: Path, peers: int, pairs: int) -> dict[str, float]:
    """Return the ratio of a service's CPU time for one provision, with metrics and health to without."""
    alone, together = Ratio("one client", 1.05), Ratio(f"{_CLIENTS} clients", 1.05)
    with ExitStack() as stack:
        sides = []
        for number, over in enumerate((_OFF, {})):
            bench = Bench(
                directory / f"watching{number}", interface=f"wgwatch{number}", port=38007 + number, over=over
            )
            stack.callback(bench.close)
            bench.fill(peers)
            sides.append(Side(bench))
        both = sides[0], sides[1]
        for pair in range(pairs):
            # New processes for each pair: the same program is some per cent faster in one than in another.
            in_turns(both, pair, 1, Side.start)
            # Not measured: what a service does for its first requests alone.
            in_turns(both, pair, 1, lambda side: side.provision(_LOAD, _CLIENTS))
            alone.add_pair(in_turns(both, pair, _CHUNKS, lambda side: side.provision(_CHUNK, 1)), cpu_ms)
            together.add_pair(in_turns(both, pair, 2, lambda side: side.provision(_LOAD, _CLIENTS)), cpu_ms)
    return {ratio.name: statistics.median(ratio.of_each_pair) for ratio in (alone, together)}


class _SeenPeers(FakeHealth):
    """Has counted its peers already, as the service's own has."""

    flapping = 0

    def states(self) -> dict[HealthState, int]:
        return {HealthState.ONLINE: len(self.seen)}


def scrapes(directory: Path, peers: int) -> dict[str, float]:
    """Return what a scrape takes, and one plain pass that writes a line for each peer; medians in ms."""
    directory.mkdir()
    health = _SeenPeers([_seen(number) for number in range(peers)])
    world = World(directory, look_every=NEVER)
    values: dict[str, list[float]] = {}
    longest = []
    try:
        watched = {
            name: _watched(world, health, per_peer=per_peer)
            for name, per_peer in (("scrape", False), ("each peer", True))
        }
        for _ in range(_SCRAPES):
            began = time.perf_counter()
            _one_pass(health)
            values.setdefault("pass ms", []).append((time.perf_counter() - began) * 1000)
            for name, metrics in watched.items():
                pieces = _pieces_ms(metrics)
                values.setdefault(f"{name} ms", []).append(sum(pieces))
                longest.append(max(pieces))
    finally:
        world.stop()
        world.records.database.close()
    return {name: statistics.median(found) for name, found in values.items()} | {
        "longest piece ms": statistics.median(longest)
    }


def _watched(world: World, health: _SeenPeers, *, per_peer: bool) -> PrometheusMetrics:
    metrics = PrometheusMetrics(hub="wg0", per_peer=per_peer)
    for number in range(_ROUTES):
        metrics.request_answered("GET", f"/api/v1/wireguard/route-{number}", 200, 0.01)
    metrics.watch(
        State(
            pool=world.pool,
            writer=world.writer,
            reconciler=world.reconciler,
            cache=world.access.cache,
            uses=world.access.uses,
            loops=(),
            health=health,
        )
    )
    return metrics


def _seen(number: int) -> PeerHealth:
    address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32"
    return PeerHealth(
        node_id=f"swarm-node-{number}",
        public_key=f"{number:043}=",
        state=HealthState.ONLINE,
        allowed_ips=(address,),
        endpoint="192.0.2.7:51820",
        received_bytes=123_456 + number,
        sent_bytes=654_321 + number,
        handshake_age=float(number % 300),
    )


def _one_pass(health: _SeenPeers) -> list[str]:
    lines = []
    for peer in health.peers():
        lines.append(f"{peer.node_id} {peer.received_bytes}\n")  # noqa: PERF401 - a plain pass is a loop
    return lines


def _pieces_ms(metrics: PrometheusMetrics) -> list[float]:
    found, last = [], time.perf_counter()
    for _ in metrics.render():
        now = time.perf_counter()
        found.append((now - last) * 1000)
        last = now
    return found
