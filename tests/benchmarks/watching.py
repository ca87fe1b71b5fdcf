"""What metrics and health cost: CPU time for each provision, a scrape, and a look at the interface."""

import base64
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from backend.adapters.metrics.prometheus import PrometheusMetrics
from backend.models.wireguard.interface import InterfaceState
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services.hub.health import HealthMonitor
from tests.benchmarks.against import Ratio, Side, cpu_ms, in_turns
from tests.benchmarks.parts import Bench
from tests.harness.core import NEVER, World
from tests.harness.peers import NOON
from tests.harness.scrapes import watch

# The settings of a service without metrics and health.
_OFF: Final = {"WIREGUARD_METRICS": "false", "WIREGUARD_HEALTH_INTERVAL": "0"}
_CLIENTS: Final = 64
_LOAD: Final = 400
_CHUNKS: Final = 4
_CHUNK: Final = 25
_SCRAPES: Final = 15
_ROUTES: Final = 20
_HUB_KEY: Final = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="
_FIRST: Final = IPv4Address("10.0.0.2")


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


def scrapes(directory: Path, peers: int) -> dict[str, float]:
    """Return what a scrape and a look take, and one plain pass over the peers' lines; medians in ms."""
    directory.mkdir()
    world = World(directory, network="10.0.0.0/8", look_every=NEVER)
    values: dict[str, list[float]] = {}
    longest = []
    try:
        nodes = [_node(number) for number in range(peers)]
        world.directory.load(nodes)
        monitor = HealthMonitor(world.directory, lambda: _HUB_KEY)
        monitor.observe(InterfaceState.parse(_dump(nodes, 0)), 1)
        watched = {
            name: _watched(world, monitor, per_peer=per_peer)
            for name, per_peer in (("scrape", False), ("scrape with each peer", True))
        }
        for number in range(1, _SCRAPES + 1):
            dump = _dump(nodes, number)
            began = time.perf_counter()
            _one_pass(dump)
            passed = time.perf_counter()
            monitor.observe(InterfaceState.parse(dump), 1)
            values.setdefault("pass ms", []).append((passed - began) * 1000)
            values.setdefault("look ms", []).append((time.perf_counter() - passed) * 1000)
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


def _watched(world: World, health: HealthMonitor, *, per_peer: bool) -> PrometheusMetrics:
    metrics = PrometheusMetrics(hub="wg0", per_peer=per_peer)
    for number in range(_ROUTES):
        metrics.request_answered("GET", f"/api/v1/wireguard/route-{number}", 200, 0.01)
    watch(metrics, world, health)
    return metrics


def _node(number: int) -> Peer:
    key = WireGuardKey(base64.b64encode(number.to_bytes(32, "big")).decode())
    return Peer(f"swarm-node-{number}", "libp2p", key, _FIRST + number, NOON)


def _dump(nodes: Sequence[Peer], looks: int) -> str:
    """Return what `wg show wg0 dump` prints of peers that have all sent a keepalive since the last look."""
    lines = [f"(none)\t{_HUB_KEY}\t51820\toff\n"]
    lines += [
        f"{node.wireguard_public_key}\t(none)\t198.51.{number >> 8}.{number & 255}:51820\t{node.address}/32\t"
        f"{1_780_000_000 + number}\t{123_456 + number + 32 * looks}\t{654_321 + number}\toff\n"
        for number, node in enumerate(nodes)
    ]
    return "".join(lines)


def _one_pass(dump: str) -> int:
    fields = 0
    for line in dump.split("\n"):
        fields += len(line.split("\t"))
    return fields


def _pieces_ms(metrics: PrometheusMetrics) -> list[float]:
    found, last = [], time.perf_counter()
    for _ in metrics.render():
        now = time.perf_counter()
        found.append((now - last) * 1000)
        last = now
    return found
