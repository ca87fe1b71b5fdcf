"""Nodes of a swarm with real tunnels. Several may share a host, and be idle or lose packets."""

import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final, Self

from tests.harness.hosts import CommandFailedError, Host, LocalHost, connect
from tests.harness.requests import API, PROVISION, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface, Interface, genkey

# RFC 2544: addresses for tests. A cable's may be in use for a moment after its host has gone.
_CABLES: Final = IPv4Network("198.18.0.0/15").subnets(new_prefix=30)
# Returns TC_ACT_SHOT where the kernel's random number is among the highest twentieth, or else TC_ACT_OK:
# tc-bpf(8) in decimal; SKF_AD_RANDOM of linux/filter.h.
_DROP_A_TWENTIETH: Final = "4,32 0 0 4294963256,53 0 1 4080218931,6 0 0 2,6 0 0 0"
_PINGS_AT_ONCE: Final = 10


class Node:
    """A node with an interface of its own; `address` is its address in the tunnel."""

    def __init__(self, host: LocalHost, tunnel: Interface, node_id: str) -> None:
        self.host = host
        self.tunnel = tunnel
        self.node_id = node_id
        self.private_key, self.public_key = genkey()
        self.address = ""

    def provision(self, service: ServiceProcess) -> None:
        """Have the service add it."""
        answer = service.client.post(PROVISION, json=provision_body(self.node_id, self.public_key))
        answer.raise_for_status()
        self.address = answer.json()["config"]["assigned_ip"]

    def join(self, hub: HubInterface, underlay: str, *, keepalive: int = 0) -> None:
        """Bring its tunnel up, to the hub at this address outside of the tunnel."""
        self.tunnel.up()
        self.tunnel.configure(
            f"[Interface]\nPrivateKey = {self.private_key}\n"
            f"[Peer]\nPublicKey = {hub.public_key}\nEndpoint = {underlay}:{hub.listen_port}\n"
            f"AllowedIPs = 10.0.0.0/24\nPersistentKeepalive = {keepalive}\n"
        )
        # A table for each node's address: on one host, answers leave through the tunnel that was asked.
        table = self.address.rpartition(".")[2]
        self.host.run(
            ["ip", "-batch", "-"],
            text=f"address add {self.address}/32 dev {self.tunnel.name}\n"
            f"rule add from {self.address} table {table}\n"
            f"route add {hub.address}/32 dev {self.tunnel.name} table {table}\n",
        )

    def move(self, hub: HubInterface) -> None:
        """Have another port outside of the tunnel from here on, and begin a new session."""
        peer = self.tunnel.show("dump").splitlines()[1].split("\t")
        wg = ["wg", "set", self.tunnel.name]
        self.host.run([*wg, "listen-port", "0", "peer", hub.public_key, "remove"])
        self.host.run([*wg, "peer", hub.public_key, "endpoint", peer[2], "allowed-ips", peer[3]])

    def reaches(self, hub: HubInterface, *, seconds: float = 1.0) -> bool:
        """Say whether the hub answers a ping within this time."""
        ping = ["ping", "-n", "-q", "-c1", f"-W{seconds}", "-I", self.address, hub.address]
        return self.host.run(ping, check=False).returncode == 0


class NodeHost:
    """A host for nodes, with a cable to the hub's; `underlay` is the hub's address on it."""

    def __init__(self, name: str, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.host = self._stack.enter_context(Host(name))
        try:
            hub, _ = connect(LocalHost(), self.host, str(next(_CABLES)))
            self.underlay = str(hub)
            # What arrives through a node's tunnel is from an address that other tunnels lead to as well.
            self.host.sysctl("ipv4/conf/all/rp_filter", "0")
            self.host.sysctl("ipv4/conf/default/rp_filter", "0")
        except BaseException:
            self.close()
            raise
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete its interfaces, and kill what runs on it."""
        self._stack.close()

    def node(self, node_id: str) -> Node:
        """Make a node, which isn't provisioned yet."""
        tunnel = self._stack.enter_context(Interface(self.host, f"wg{next(self._numbers)}", self._directory))
        return Node(self.host, tunnel, node_id)

    def join(
        self, service: ServiceProcess, hub: HubInterface, *node_ids: str, keepalive: int = 0
    ) -> list[Node]:
        """Provision nodes and bring their tunnels up, to a hub on pytest's host."""
        route_to_nodes(hub)
        nodes = [self.node(node_id) for node_id in node_ids]
        for node in nodes:
            node.provision(service)
        for node in nodes:
            node.join(hub, self.underlay, keepalive=keepalive)
        return nodes

    def lose_packets(self) -> None:
        """Lose 5 % of what it sends and receives: by tc-netem(8), or by a filter where there is no netem."""
        for host in (self.host, LocalHost()):
            cable = self._cable(host)
            try:
                host.run(["tc", "qdisc", "add", "dev", cable, "root", "netem", "loss", "5%"])
            except CommandFailedError:
                host.run(["tc", "qdisc", "add", "dev", cable, "clsact"])
                drop = ["bpf", "direct-action", "bytecode", _DROP_A_TWENTIETH]
                host.run(["tc", "filter", "add", "dev", cable, "egress", *drop])

    def _cable(self, host: LocalHost) -> str:
        subnet = f"{self.underlay}/30"
        return host.run(["ip", "-oneline", "address", "show", "to", subnet]).stdout.split()[1]


def route_to_nodes(hub: HubInterface) -> None:
    """Have the hub's host reach the nodes through the tunnel."""
    hub.host.run(["ip", "route", "replace", "10.0.0.0/24", "dev", hub.name])


def silent(hub: HubInterface, nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes that don't answer a ping from the hub within a second."""

    def answers(node: Node) -> bool:
        ping = ["ping", "-n", "-q", "-c1", "-W1", node.address]
        return hub.host.run(ping, check=False).returncode == 0

    asked = list(nodes)
    with ThreadPoolExecutor(_PINGS_AT_ONCE) as pool:
        return [node for node, came in zip(asked, pool.map(answers, asked), strict=True) if not came]


def hub_health(service: ServiceProcess, **query: Any) -> dict[str, Any]:
    """Return what GET /wireguard/health answers."""
    answer = service.client.get(f"{API}/health", params=query)
    answer.raise_for_status()
    health: dict[str, Any] = answer.json()
    return health


def shown(hub: HubInterface, what: str) -> dict[str, str]:
    """Return what `wg show NAME what` prints of each peer, by its key."""
    return dict(line.split("\t", 1) for line in hub.show(what).splitlines())
