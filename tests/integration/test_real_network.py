"""Nodes configured from the service's answer alone reach the hub and each other through real tunnels."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, Final

import pytest

from tests.harness.hosts import Host, LocalHost, connect
from tests.harness.requests import PEERS, PROVISION, provision_body
from tests.harness.requirements import require
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface, Interface, genkey

# RFC 5737: addresses for documentation, so that no route of anybody's is meant by them.
_HUB_ADDRESS: Final = "203.0.113.1"
_HUB_PORT: Final = 51820
_HUB_TUNNEL_ADDRESS: Final = "10.0.0.1"
# A handshake whose first packet is lost is tried again after 5 s (REKEY_TIMEOUT): time for a few of them.
_TUNNEL_SECONDS: Final = 20.0
_VISITORS: Final = 100

# What a node has to do over HTTP, with nothing but the standard library and no proxy of the machine.
_CALL: Final = """
import http.client, sys
method, address, path, credential = sys.argv[1:]
connection = http.client.HTTPConnection(address, timeout=30)
connection.request(method, path, sys.stdin.read() or None,
    {"Content-Type": "application/json", "Authorization": credential})
response = connection.getresponse()
sys.stderr.write(str(response.status))
sys.stdout.write(response.read().decode())
"""


@dataclass
class Node:
    """A node of the swarm, on a host of its own."""

    name: str
    host: Host
    tunnel: Interface
    private_key: str
    public_key: str

    def call(self, service: ServiceProcess, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Call the service from the node's own network; return status and answer."""
        answer = self.host.run(
            [
                sys.executable,
                "-I",
                "-c",
                _CALL,
                method,
                service.url.removeprefix("http://"),
                f"/api/v1{path}",
                service.client.headers["Authorization"],
            ],
            text=json.dumps(body) if body is not None else "",
            timeout=60,
        )
        return int(answer.stderr), json.loads(answer.stdout)

    def join(self, config: dict[str, Any]) -> None:
        """Bring up the node's tunnel from a PeerConfiguration alone."""
        address = IPv4Interface(f"{config['assigned_ip']}/{config['subnet_mask']}")
        self.tunnel.up()
        self.tunnel.configure(
            f"[Interface]\nPrivateKey = {self.private_key}\n"
            f"[Peer]\nPublicKey = {config['hub_public_key']}\nEndpoint = {config['hub_endpoint']}\n"
            f"AllowedIPs = {config['allowed_ips']}\nPersistentKeepalive = {config['persistent_keepalive']}\n"
        )
        self.host.run(["ip", "address", "add", f"{address.ip}/32", "dev", self.tunnel.name])
        self.host.run(["ip", "route", "add", config["allowed_ips"], "dev", self.tunnel.name])

    def reaches(self, address: str) -> bool:
        """Say whether one ping is answered within a second."""
        return self.host.run(["ping", "-n", "-c1", "-W1", address], check=False).returncode == 0


@dataclass
class Swarm:
    """One hub with its service, and the nodes that have a cable to it."""

    hub: HubInterface
    service: ServiceProcess
    nodes: list[Node]


class Pings:
    """A ping that runs all the time."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self._process = process
        self._log_path = log_path

    @property
    def answered(self) -> set[int]:
        """The sequence numbers of the answers so far."""
        return {
            int(number) for number in re.findall(r"bytes from .*icmp_seq=(\d+)", self._log_path.read_text())
        }

    def stop(self) -> int:
        """Stop it and return how many it has sent."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        match = re.search(r"(\d+) packets transmitted", self._log_path.read_text())
        assert match is not None
        return int(match[1])


@contextmanager
def _pinging(host: Host, address: str, log_path: Path) -> Iterator[Pings]:
    # Often enough to see an interruption of milliseconds: wireguard-go opens its socket anew whenever it is
    # given a port, even the one that it has, and what arrives meanwhile is lost.
    with log_path.open("wb") as log:
        process = host.popen(
            ["ping", "-n", "-i", "0.005", address], stdout=log, stderr=log, env=dict(os.environ, LC_ALL="C")
        )
    try:
        yield Pings(process, log_path)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def swarm(needs_wireguard: None, tmp_path: Path) -> Iterator[Swarm]:
    """Build a hub and two nodes, none of them provisioned yet; pytest has a cable to the hub, too."""
    require("ping")
    with ExitStack() as stack:
        hub_host = stack.enter_context(Host("hub"))
        hub_host.run(["ip", "address", "add", f"{_HUB_ADDRESS}/32", "dev", "lo"])
        # A hub forwards from one peer to another.
        hub_host.sysctl("ipv4/ip_forward", "1")
        nodes = []
        for number in (1, 2):
            host = stack.enter_context(Host(f"node{number}"))
            gateway, _ = connect(hub_host, host, f"192.0.2.{4 * number}/30")
            host.run(["ip", "route", "add", _HUB_ADDRESS, "via", str(gateway)])
            tunnel = stack.enter_context(Interface(host, "wg0", tmp_path))
            nodes.append(Node(f"node-{number}", host, tunnel, *genkey()))
        gateway, _ = connect(hub_host, LocalHost(), "192.0.2.252/30")
        LocalHost().run(["ip", "route", "replace", _HUB_ADDRESS, "via", str(gateway)])

        hub = stack.enter_context(HubInterface(hub_host, "wg0", tmp_path, listen_port=_HUB_PORT))
        hub.start()
        hub_host.run(["ip", "address", "add", f"{_HUB_TUNNEL_ADDRESS}/24", "dev", hub.name])
        settings = {
            "WIREGUARD_CONFIG_PATH": hub.config_path,
            "WIREGUARD_HUB_ENDPOINT": f"{_HUB_ADDRESS}:{_HUB_PORT}",
        }
        service = stack.enter_context(ServiceProcess(tmp_path, settings, host=hub_host, address=_HUB_ADDRESS))
        # They come from elsewhere, and are let in by what they show.
        service.become_admin()
        yield Swarm(hub, service, nodes)


def _provision_and_join(swarm: Swarm, node: Node) -> str:
    body = provision_body(node.name, node.public_key)
    status, answer = node.call(swarm.service, "POST", "/wireguard/provision", body)
    assert status == 200, answer
    node.join(answer["config"])
    return str(answer["config"]["assigned_ip"])


def _eventually_reaches(node: Node, address: str) -> bool:
    deadline = time.monotonic() + _TUNNEL_SECONDS
    while time.monotonic() < deadline:
        if node.reaches(address):
            return True
    return False


def test_provisioned_nodes_reach_hub_and_each_other(swarm: Swarm) -> None:
    first, second = swarm.nodes
    assert not first.reaches(_HUB_TUNNEL_ADDRESS)
    addresses = {node.public_key: _provision_and_join(swarm, node) for node in swarm.nodes}
    assert swarm.hub.peers() == {key: {f"{address}/32"} for key, address in addresses.items()}
    assert all(_eventually_reaches(node, _HUB_TUNNEL_ADDRESS) for node in swarm.nodes)
    assert _eventually_reaches(first, addresses[second.public_key])
    assert _eventually_reaches(second, addresses[first.public_key])
    # The hub has seen both as WireGuard peers: nothing went around the tunnel.
    handshakes = dict(line.split("\t") for line in swarm.hub.show("latest-handshakes").splitlines())
    assert set(handshakes) == set(addresses)
    assert "0" not in handshakes.values()


def test_deprovisioned_node_is_cut_off_and_the_others_notice_nothing(swarm: Swarm, tmp_path: Path) -> None:
    leaver, stayer = swarm.nodes
    _provision_and_join(swarm, leaver)
    address = _provision_and_join(swarm, stayer)
    assert _eventually_reaches(leaver, _HUB_TUNNEL_ADDRESS)
    assert _eventually_reaches(stayer, _HUB_TUNNEL_ADDRESS)

    with _pinging(stayer.host, _HUB_TUNNEL_ADDRESS, tmp_path / "ping.log") as pings:
        status, answer = leaver.call(swarm.service, "DELETE", f"/wireguard/peers/{leaver.name}")
        assert status == 200, answer
        assert swarm.hub.peers() == {stayer.public_key: {f"{address}/32"}}
        # Its keys went with the peer, so what it still sends is noise to the hub.
        assert not any(leaver.reaches(_HUB_TUNNEL_ADDRESS) for _ in range(3))

        with ThreadPoolExecutor(10) as pool:
            assert set(pool.map(lambda number: _visit(swarm, f"visitor-{number}"), range(_VISITORS))) == {200}
        assert swarm.hub.peers() == {stayer.public_key: {f"{address}/32"}}

        last = max(pings.answered)
        deadline = time.monotonic() + _TUNNEL_SECONDS
        while max(pings.answered) < last + 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sent = pings.stop()
    # The last one may have been on its way when ping was stopped.
    assert set(range(1, sent)) - pings.answered == set()


def _visit(swarm: Swarm, node_id: str) -> int:
    """Come and go; return the status of the going."""
    client = swarm.service.client
    answer = client.post(PROVISION, json=provision_body(node_id))
    assert answer.status_code == 200, answer.text
    return client.delete(f"{PEERS}/{node_id}").status_code
